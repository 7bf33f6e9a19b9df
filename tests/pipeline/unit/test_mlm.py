"""Encoders that are not cut. What they compute is held to plain transformers in test_objectives."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from data_prep.command import ConfigError
from pipeline.attention import PACKED
from pipeline.config import Recipe
from pipeline.float8 import Float8Linear
from pipeline.loader import Batch, Masked
from pipeline.models import (
    Target,
    build_student,
    load_teacher,
    own_weights,
    pack_encoder,
    parameter_shapes,
    student_config,
)
from pipeline.objectives import Outputs, Predictions

CPU = torch.device("cpu")
LAYER = 3  # the last one of the tiny models
BATCH = Batch(
    input_ids=torch.arange(5, 15)[None],
    positions=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
    cu_seqlens=torch.tensor([0, 4, 10], dtype=torch.int32),
    max_seqlen=6,
    first_position=0,
    row_ids=(0,),
    masked=Masked(torch.tensor([1, 2, 9]), torch.tensor([30, 7, 8])),
)
UNMASKED = dataclasses.replace(BATCH, masked=None)
each_family = pytest.mark.parametrize("family", ["bert", "camembert", "roberta", "xlm-roberta"])


@pytest.fixture(scope="session")
def with_heads(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The tiny models with a random prediction head on top."""
    folders = {}
    for family, source in tiny_models.items():
        torch.manual_seed(3)
        folders[family] = tmp_path_factory.mktemp(f"{family}-mlm")
        AutoModelForMaskedLM.from_pretrained(source).save_pretrained(folders[family])
    return folders


@each_family
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_head_keeps_its_parameters_names(
    family: str, tied: bool, with_heads: dict[str, Path]
) -> None:
    config = AutoConfig.from_pretrained(with_heads[family], tie_word_embeddings=tied)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=PACKED)
    whole = own_weights(model)
    assert any(name.endswith("decoder.weight") for name in whole) is not tied
    named = pack_encoder(model, Predictions).named_weights()
    assert named.keys() == whole.keys()
    assert all(torch.equal(named[name], whole[name]) for name in whole)


@each_family
def test_parameter_shapes_of_a_model_with_a_head(family: str, with_heads: dict[str, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(with_heads[family])
    named = {name: p.shape for name, p in model.named_parameters()}
    shapes = parameter_shapes(with_heads[family])
    assert len(shapes) == len(named)
    assert all(shape == model.get_parameter(name).shape for name, shape in shapes.items())


def test_the_embedding_and_the_head_stay_one_weight(with_heads: dict[str, Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(with_heads["roberta"], attn_implementation=PACKED)
    encoder = pack_encoder(model, Predictions)
    name = "roberta.embeddings.word_embeddings.weight"
    assert encoder.named_weights()[name] is model.lm_head.decoder.weight
    assert encoder.word_embeddings is None  # nothing is gained by gathering its gradient


@pytest.mark.parametrize("needs", [Outputs, Predictions])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_teacher_in_bf16_is_near_the_one_in_fp32(
    needs: type, family: str, with_heads: dict[str, Path], make_recipe: Callable[..., Recipe]
) -> None:
    """Where a CPU has bf16 kernels, the last layer and the head are laid out anew too."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        recipe = make_recipe(teacher={"model": str(with_heads[family]), "dtype": dtype})
        batch = BATCH if needs is Predictions else UNMASKED
        outputs = load_teacher(recipe, CPU, [Target(needs, LAYER)])(batch)
        results[dtype] = outputs.hidden, outputs[1] if needs is Predictions else outputs.qkv.v
    for exact, rounded in zip(*results.values(), strict=True):
        assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        assert not rounded.requires_grad
        error = (rounded.float() - exact).norm() / exact.norm()
        assert 0 < float(error) < 0.03


def test_float8_leaves_the_last_layer_alone(
    pocket_teacher: Path, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(teacher={"model": str(pocket_teacher), "dtype": "float8", "layer": 3})
    teacher = load_teacher(recipe, CPU, [Target(Outputs, 3)])
    layers = teacher._encoder.model.encoder.layer
    assert len(layers) == 3
    has_float8 = [any(isinstance(m, Float8Linear) for m in layer.modules()) for layer in layers]
    assert has_float8 == [True, True, False]


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_teacher_without_a_head_is_refused(
    family: str, tiny_models: dict[str, Path], make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(teacher={"model": str(tiny_models[family])})
    with pytest.raises(ConfigError, match=r"teacher\.model=.*random.*head of masked language"):
        load_teacher(recipe, CPU, [Target(Predictions, LAYER)])


def test_a_student_without_a_head_gets_a_new_one_of_the_seed(
    tiny_models: dict[str, Path], make_recipe: Callable[..., Recipe]
) -> None:
    student = make_recipe(student={"model": str(tiny_models["bert"])}).student
    states = [
        build_student(student, student_config(student, None), seed, Predictions).state_dict()
        for seed in (1, 1, 2)
    ]
    head = "cls.predictions.transform.dense.weight"
    assert torch.equal(states[0][head], states[1][head])
    assert not torch.equal(states[0][head], states[2][head])
    encoder = AutoModel.from_pretrained(tiny_models["bert"]).state_dict()
    for name, weight in encoder.items():
        if not name.startswith("pooler"):
            assert torch.equal(states[0][f"bert.{name}"], weight)


def test_a_student_that_lacks_more_than_a_head_is_refused(
    with_heads: dict[str, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = shutil.copytree(with_heads["bert"], tmp_path / "student")
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 4
    config.save_pretrained(folder)
    student = make_recipe(student={"model": str(folder)}).student
    with pytest.raises(ConfigError, match=r"student\.model=.*encoder\.layer\.3.*random"):
        build_student(student, student_config(student, None), 1, Predictions)


def test_students_with_and_without_soft_targets_share_a_pass(
    with_heads: dict[str, Path], make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(teacher={"model": str(with_heads["bert"]), "dtype": "float32"})
    targets = [Target(Predictions, LAYER), Target(Outputs, LAYER)]
    teacher = load_teacher(recipe, CPU, targets)
    predicting, plain = (teacher.of(target, BATCH) for target in targets)
    alone = load_teacher(recipe, CPU, targets[1:])(BATCH)
    assert predicting.logits.shape == (3, 40)
    assert torch.equal(plain.hidden, predicting.hidden)
    torch.testing.assert_close(plain.hidden, alone.hidden)
