from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from data_prep.command import ConfigError
from pipeline.attention import PACKED
from pipeline.config import Recipe, Student
from pipeline.loader import Batch
from pipeline.models import (
    CutEncoder,
    Target,
    TeacherModel,
    build_student,
    load_teacher,
    load_tokenizer,
    longest_segment,
    parameter_shapes,
    read_config,
    student_config,
    unused_shape_keys,
)
from pipeline.objectives import QKV

CPU = torch.device("cpu")
LENGTHS = (7, 1, 16, 3, 12)  # together more than the tiny models have positions for
each_family = pytest.mark.parametrize("family", ["bert", "camembert", "roberta", "xlm-roberta"])


def random_segments(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 40, (length,), generator=generator) for length in LENGTHS]


def pack(segments: Sequence[torch.Tensor]) -> Batch:
    ends = torch.tensor([len(segment) for segment in segments]).cumsum(0)
    return Batch(
        input_ids=torch.cat(list(segments))[None],
        positions=torch.cat([torch.arange(len(segment)) for segment in segments])[None],
        cu_seqlens=torch.cat([torch.zeros(1), ends]).to(torch.int32),
        max_seqlen=max(map(len, segments)),
        first_position=0,
        row_ids=(0,),
    )


def forward(encoder: CutEncoder, segments: Sequence[torch.Tensor]) -> QKV:
    batch = pack(segments)
    return encoder(batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen)


def plain_qkv(model: Any, layer: int, ids: torch.Tensor, mask: torch.Tensor) -> QKV:
    """Of a plain transformers model: what `layer` (1-based) projects its input to."""
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        attention = model.encoder.layer[layer - 1].attention.self
        projections = (attention.query, attention.key, attention.value)
        return QKV(*(projection(states[layer - 1]) for projection in projections))


def load_plain(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def teacher_recipe(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    return lambda folder, **keys: make_recipe(teacher={"model": str(folder), **keys})


@each_family
@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_the_teacher_gives_what_the_plain_model_gives(
    family: str, layer: int | None, tiny_models: dict[str, Path], teacher_recipe
) -> None:
    plain = load_plain(tiny_models[family])
    segments = random_segments()
    packed = load_teacher(teacher_recipe(tiny_models[family], layer=layer), CPU)(pack(segments))

    alone = [plain_qkv(plain, layer or 3, ids[None], torch.ones(1, len(ids))) for ids in segments]
    ids = torch.nn.utils.rnn.pad_sequence(
        segments, batch_first=True, padding_value=plain.config.pad_token_id
    )
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).float()
    padded = plain_qkv(plain, layer or 3, ids, mask)
    for index, ours in enumerate(packed):
        torch.testing.assert_close(
            ours, torch.cat([qkv[index][0] for qkv in alone]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(ours, padded[index][mask.bool()], rtol=1e-5, atol=1e-5)


@each_family
def test_the_student_in_evaluation_gives_what_the_plain_model_gives(
    family: str, tiny_models: dict[str, Path]
) -> None:
    model = AutoModel.from_pretrained(tiny_models[family], attn_implementation=PACKED)
    ids = random_segments()[2]
    with torch.no_grad():
        ours = forward(CutEncoder(model).eval(), [ids])
    theirs = plain_qkv(load_plain(tiny_models[family]), 3, ids[None], torch.ones(1, len(ids)))
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain[0], rtol=1e-5, atol=1e-5)


@each_family
def test_a_segment_may_be_as_long_as_the_model_has_positions(
    family: str, tiny_models: dict[str, Path], teacher_recipe
) -> None:
    config = AutoConfig.from_pretrained(tiny_models[family])
    longest = longest_segment(config)
    assert longest == (20 if family == "bert" else 18)
    teacher = load_teacher(teacher_recipe(tiny_models[family]), CPU)
    teacher(pack([torch.full((longest,), 7)]))
    with pytest.raises((IndexError, RuntimeError)):
        teacher(pack([torch.full((longest + 1,), 7)]))


def test_the_teacher_gives_the_same_every_time_and_records_nothing(
    tiny_models: dict[str, Path], teacher_recipe
) -> None:
    teacher = load_teacher(teacher_recipe(tiny_models["bert"]), CPU)
    batch = pack(random_segments())
    first, second = teacher(batch), teacher(batch)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)  # dropout 0.5 would show
        assert one.is_inference()
        assert not one.requires_grad
    assert not isinstance(teacher, torch.nn.Module)


def test_the_teacher_is_put_in_evaluation_and_frozen(tiny_models: dict[str, Path]) -> None:
    model = AutoModel.from_pretrained(tiny_models["bert"], attn_implementation=PACKED).train()
    teacher, batch = TeacherModel(CutEncoder(model), [Target(QKV, 1)]), pack(random_segments())
    assert torch.equal(teacher(batch).q, teacher(batch).q)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_computes_in_the_recipes_dtype(
    dtype: str, tiny_models: dict[str, Path], teacher_recipe
) -> None:
    teacher = load_teacher(teacher_recipe(tiny_models["roberta"], dtype=dtype), CPU)
    assert {t.dtype for t in teacher(pack(random_segments()))} == {getattr(torch, dtype)}


def without_layer(source: Path, destination: Path, layer: int) -> Path:
    """A copy of a model folder that lacks a layer's (0-based) weights."""
    shutil.copytree(source, destination)
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if f"layer.{layer}." not in name}
    assert len(kept) < len(weights)
    save_file(kept, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


@each_family
def test_layers_above_the_teachers_are_not_even_read(
    family: str, tiny_models: dict[str, Path], teacher_recipe, tmp_path: Path
) -> None:
    folder = without_layer(tiny_models[family], tmp_path / "cut", layer=2)
    batch = pack(random_segments())
    cut = load_teacher(teacher_recipe(folder, layer=2), CPU)(batch)
    whole = load_teacher(teacher_recipe(tiny_models[family], layer=2), CPU)(batch)
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))


def test_weights_that_are_missing_are_refused_not_made_up(
    tiny_models: dict[str, Path], teacher_recipe, make_recipe, tmp_path: Path
) -> None:
    folder = without_layer(tiny_models["bert"], tmp_path / "cut", layer=2)
    with pytest.raises(ConfigError, match=r"teacher\.model.*encoder\.layer\.2.*random"):
        load_teacher(teacher_recipe(folder), CPU)
    student = make_recipe(student={"model": str(folder)}).student
    with pytest.raises(ConfigError, match=r"student\.model.*encoder\.layer\.2.*random"):
        build_student(student, student_config(student, None), seed=1)


@pytest.mark.parametrize("damage", ["no weights", "truncated", "garbage", "other shapes"])
def test_a_folder_whose_weights_do_not_load_is_refused(
    damage: str, tiny_models: dict[str, Path], teacher_recipe, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_models["bert"], tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"garbage")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 44}))
    with pytest.raises(ConfigError, match=r"teacher\.model="):
        load_teacher(teacher_recipe(folder), CPU)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "not json",
        "[1]",
        "{}",
        '{"model_type": "no-such-model"}',
        '{"model_type": "bert", "hidden_size": "wide"}',
    ],
)
def test_a_folder_without_a_readable_configuration_is_refused(
    content: str | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    rule = "has no config.json" if content is None else ""
    with pytest.raises(ConfigError, match=rf"student\.model='{tmp_path}'.*{rule}"):
        read_config("student.model", str(tmp_path))


@pytest.mark.parametrize("source", ["./no-such", "/no/such", "~/no/such", "a/b/c"])
def test_a_path_that_is_no_folder_is_called_one(source: str) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.model='{source}' is not a folder"):
        read_config("teacher.model", source)


def test_a_hub_id_that_cannot_be_had_is_refused() -> None:  # the hub is offline here
    with pytest.raises(ConfigError, match=r"teacher\.model='no-such/model' does not load"):
        read_config("teacher.model", "no-such/model")


# The student


@pytest.fixture
def new_student(tiny_models: dict[str, Path], make_recipe) -> Callable[..., Any]:
    """Builds a new student of a family's teacher."""

    def build(family: str = "xlm-roberta", seed: int = 1, **student: Any) -> Any:
        recipe = make_recipe(student=student)
        teacher = read_config("teacher.model", str(tiny_models[family]))
        return build_student(recipe.student, student_config(recipe.student, teacher), seed)

    return build


def test_the_seed_decides_the_students_first_weights(new_student) -> None:
    torch.rand(3)  # whatever was drawn before does not matter
    first, second, other = new_student(seed=5), new_student(seed=5), new_student(seed=6)
    name = "encoder.layer.0.attention.self.query.weight"
    assert_same_state(first.state_dict(), second.state_dict())
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_family
def test_a_new_student_has_the_recipes_shape_and_the_teachers_vocabulary(
    family: str, new_student
) -> None:
    model = new_student(family, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.125)
    config = model.config
    assert config.model_type == family
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    assert (config.num_attention_heads, config.intermediate_size) == (2, 32)
    assert (config.vocab_size, config.max_position_embeddings) == (40, 20)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.125)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_teachers_configuration_is_left_alone(tiny_models, make_recipe) -> None:
    teacher = read_config("teacher.model", str(tiny_models["bert"]))
    before = teacher.to_dict()
    student_config(make_recipe().student, teacher)
    assert teacher.to_dict() == before


def test_a_student_may_start_from_a_folder(tiny_models: dict[str, Path], make_recipe) -> None:
    student = make_recipe(
        student={"model": str(tiny_models["bert"]), "hidden_dropout_prob": 0.125}
    ).student
    model = build_student(student, student_config(student, None), seed=1)
    assert_same_state(dict(model.state_dict()), load_plain(tiny_models["bert"]).state_dict())
    assert model.config.num_hidden_layers == 3
    assert model.config.hidden_dropout_prob == 0.125
    assert not load_plain(tiny_models["bert"]).config.hidden_dropout_prob == 0.125


def test_the_student_drops_out_in_training_alone(new_student) -> None:
    encoder = CutEncoder(new_student(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5))
    segments = random_segments()
    encoder.eval()
    assert torch.equal(forward(encoder, segments).q, forward(encoder, segments).q)
    encoder.train()
    assert not torch.equal(forward(encoder, segments).q, forward(encoder, segments).q)


@each_family
def test_what_no_loss_reaches_is_taken_out_and_the_rest_keeps_its_name(
    family: str, new_student
) -> None:
    model = new_student(family)
    whole = {name: parameter.shape for name, parameter in model.named_parameters()}
    encoder = CutEncoder(model)
    named = encoder.named_weights()
    assert {name: parameter.shape for name, parameter in named.items()}.items() <= whole.items()
    last = "encoder.layer.1."
    beyond = (f"{last}attention.output", f"{last}intermediate", f"{last}output", "pooler")
    assert whole.keys() - named.keys() == {name for name in whole if name.startswith(beyond)}
    assert any(name.startswith("pooler") for name in whole)


def test_every_weight_that_is_left_gets_a_gradient(new_student) -> None:
    encoder = CutEncoder(new_student(hidden_dropout_prob=0.0)).train()
    sum(part.square().sum() for part in forward(encoder, random_segments())).backward()
    untouched = [name for name, p in encoder.named_weights().items() if p.grad is None]
    assert untouched == []


@each_family
def test_parameter_shapes_are_those_of_the_whole_model(
    family: str, tiny_models: dict[str, Path]
) -> None:
    state = load_plain(tiny_models[family]).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert parameter_shapes(tiny_models[family]) == shapes


# The tokenizer


def test_load_tokenizer_of_any_family(pocket_teacher: Path, bert_tokenizer: Path) -> None:
    xlm, bert = load_tokenizer(str(pocket_teacher)), load_tokenizer(str(bert_tokenizer))
    assert xlm.convert_ids_to_tokens(xlm("")["input_ids"]) == ["<s>", "</s>"]
    assert bert.convert_ids_to_tokens(bert("")["input_ids"]) == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize(
    "content",
    ["not json", "{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "None"}}'],
)
def test_a_tokenizer_that_does_not_load_is_refused(
    content: str, pocket_teacher: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(pocket_teacher / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"the tokenizer '{tmp_path}' does not load"):
        load_tokenizer(str(tmp_path))


def test_a_students_own_shape_is_told_where_the_recipe_says_another() -> None:
    shape = {"num_hidden_layers": 3, "hidden_size": 384}
    shape |= {"num_attention_heads": 12, "intermediate_size": 1536}
    config = SimpleNamespace(model_type="bert", **shape)
    assert unused_shape_keys(Student(num_hidden_layers=6), config) == []
    (told,) = unused_shape_keys(Student(model="folder"), config)
    assert told == "student.num_hidden_layers=6 (it has 3)"
