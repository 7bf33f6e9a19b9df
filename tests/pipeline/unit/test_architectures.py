"""Every family against what transformers' own eager attention is given, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from data_prep.command import ConfigError
from pipeline.architectures import ARCHITECTURES, architecture_of
from pipeline.attention import PACKED
from pipeline.config import Recipe, Student
from pipeline.loader import Batch, Masked
from pipeline.models import (
    CutEncoder,
    Target,
    WholeEncoder,
    build_student,
    load_teacher,
    longest_segment,
    num_word_embeddings,
    parameter_shapes,
    read_config,
    student_config,
    unused_shape_keys,
)
from pipeline.objectives import QKV, Outputs, Predictions
from pipeline.prepacked import can_prepack

CPU = torch.device("cpu")
LAYERS, VOCABULARY = 5, 41
LENGTHS = (7, 1, 16, 3, 12)  # together more than the models have positions for
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 20,
    "hidden_dropout_prob": 0.5,  # whoever forgets eval mode is found out
    "attention_probs_dropout_prob": 0.5,
}
MODERN = {
    **{key: SHAPE[key] for key in list(SHAPE)[:6]},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 3),
    **dict.fromkeys(("cls_token_id", "sep_token_id"), 4),
    **dict.fromkeys(("embedding_dropout", "mlp_dropout", "attention_dropout"), 0.5),
    "local_attention": 4,  # two tokens on either side; local are layers 2, 3 and 5
}
FAIRSEQ = {**SHAPE, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
BOTH = {"rope_type": "default", "rope_theta": 160000.0}
# How each is published: the class that saved it, and what its configuration does not leave at the
# default. Mean pooling (E5) and BGE-M3's heads are not in the model that AutoModel loads.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForPreTraining", {**SHAPE, "pad_token_id": 0, "layer_norm_eps": 1e-12}),
    "minilm": ("BertModel", {**SHAPE, "pad_token_id": 1, "num_attention_heads": 4}),
    "roberta": ("RobertaForMaskedLM", FAIRSEQ),
    "camembert": ("CamembertForMaskedLM", FAIRSEQ),
    "xlm-r": ("XLMRobertaForMaskedLM", FAIRSEQ),
    "e5": ("XLMRobertaModel", FAIRSEQ),
    "bge-reranker": ("XLMRobertaForSequenceClassification", {**FAIRSEQ, "num_labels": 1}),
    "xlm-r-xl": ("XLMRobertaXLForMaskedLM", FAIRSEQ),
    "electra-small": ("ElectraForPreTraining", {**SHAPE, "embedding_size": 16}),
    "electra-base": ("ElectraForPreTraining", {**SHAPE, "embedding_size": 32}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {
            **{key: SHAPE[key] for key in ("vocab_size", "max_position_embeddings")},
            **{"dim": 32, "n_heads": 2, "hidden_dim": 48, "n_layers": LAYERS},
            **{"dropout": 0.5, "attention_dropout": 0.5, "sinusoidal_pos_embds": True},
        },
    ),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "mmbert": (
        "ModernBertForMaskedLM",
        {**MODERN, "rope_parameters": {"full_attention": BOTH, "sliding_attention": BOTH}},
    ),
}
each_teacher = pytest.mark.parametrize("name", TEACHERS)
each_student = pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "xlm-roberta", "modernbert"]
)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved random model of each; every parameter is random, biases and norms too."""
    return {name: save_teacher(name, tmp_path_factory.mktemp(name)) for name in TEACHERS}


def save_teacher(name: str, folder: Path) -> Path:
    class_name, settings = TEACHERS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_of(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    return lambda folder, **keys: make_recipe(teacher={"model": str(folder), **keys})


def random_segments() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


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


def arguments(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen


# What transformers computes


class Plain:
    """A plain eager model, and what its attention was given and gave in the last forward pass.

    Args:
        source: a model folder, or a plain model.
    """

    def __init__(self, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = (
            AutoModel.from_pretrained(source, attn_implementation="eager").eval()
            if isinstance(source, Path)
            else source
        )
        self.qkv: list[QKV] = []  # of each layer, [B, T, d], heads side by side
        self.weights: list[torch.Tensor] = []  # of each layer, [B, heads, T, T]
        module: Any = sys.modules[type(self.model).__module__]
        eager = module.eager_attention_forward

        def recording(layer: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
            output, weights = eager(layer, q, k, v, *rest, **options)
            if hasattr(self.model, "rotary_emb"):
                q, k = (x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in (q, k))
            self.qkv.append(QKV(*(x.transpose(1, 2).flatten(2) for x in (q, k, v))))
            self.weights.append(weights)
            return output, weights

        monkeypatch.setattr(module, "eager_attention_forward", recording)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """last_hidden_state."""
        self.qkv.clear()
        self.weights.clear()
        hidden: torch.Tensor = self.model(ids, attention_mask=mask).last_hidden_state
        return hidden


@torch.no_grad()
def one_by_one(plain: Plain, segments: Sequence[torch.Tensor]) -> tuple[list[QKV], torch.Tensor]:
    """Every layer's Q, K, V and the last hidden state, [T, d], of each segment alone."""
    hidden, layers = [], []
    for ids in segments:
        hidden.append(plain(ids[None], torch.ones(1, len(ids)))[0])
        layers.append(list(plain.qkv))
    joined = [
        QKV(*(torch.cat([part[0] for part in parts]) for parts in zip(*of_layer, strict=True)))
        for of_layer in zip(*layers, strict=True)
    ]
    return joined, torch.cat(hidden)


@torch.no_grad()
def padded(plain: Plain, segments: Sequence[torch.Tensor]) -> tuple[list[QKV], torch.Tensor]:
    """The same of one padded batch."""
    pad_id = plain.model.config.pad_token_id
    ids = nn.utils.rnn.pad_sequence(list(segments), batch_first=True, padding_value=pad_id)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    hidden = plain(ids, mask.float())
    return [QKV(*(part[mask] for part in qkv)) for qkv in plain.qkv], hidden[mask]


def assert_equal_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


# Teachers


@each_teacher
def test_every_layer_gives_what_attention_is_given_in_the_plain_model(
    name: str, teachers: dict[str, Path], recipe_of, monkeypatch
) -> None:
    segments, plain = random_segments(), Plain(teachers[name], monkeypatch)
    for expected, _ in (one_by_one(plain, segments), padded(plain, segments)):
        assert len(expected) == LAYERS
        for layer, theirs in enumerate(expected, start=1):
            ours = load_teacher(recipe_of(teachers[name], layer=layer), CPU)(pack(segments))
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.is_inference()
                assert_equal_to_rounding(mine, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("needs", [(QKV,), (Outputs,), (QKV, Outputs)], ids=str)
@each_teacher
def test_one_pass_gives_any_layers_to_the_bit(
    name: str, needs: tuple[Any, ...], dtype: str, teachers: dict[str, Path], recipe_of
) -> None:
    batch, folder = pack(random_segments()), teachers[name]
    for chosen in ((1, 2, 3, 4, 5), (2, 4), (3,)):
        targets = [Target(kind, layer) for kind in needs for layer in chosen]
        teacher = load_teacher(recipe_of(folder, dtype=dtype), CPU, targets)
        for target in targets:
            alone = load_teacher(recipe_of(folder, dtype=dtype), CPU, [target])(batch)
            found = teacher.of(target, batch)
            assert type(found) is type(alone) is target.needs
            assert all(map(torch.equal, tensors(found), tensors(alone)))


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [outputs.hidden, *outputs.qkv] if isinstance(outputs, Outputs) else list(outputs)


def test_a_pass_is_made_once_and_no_layer_is_run_in_vain(
    teachers: dict[str, Path], recipe_of, monkeypatch
) -> None:
    targets, run = [Target(QKV, 1), Target(QKV, 3)], []
    teacher = load_teacher(recipe_of(teachers["bert"]), CPU, targets)
    for index, layer in enumerate(teacher._encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: run.append(index))
    batch = pack(random_segments())
    for target in (*targets, *targets):
        teacher.of(target, batch)
    assert run == [0, 1]
    teacher.of(targets[0], pack(random_segments()))
    assert run == [0, 1, 0, 1]


@each_teacher
def test_a_whole_encoder_gives_the_last_hidden_state(
    name: str, teachers: dict[str, Path], monkeypatch
) -> None:
    segments, plain = random_segments(), Plain(teachers[name], monkeypatch)
    model = AutoModel.from_pretrained(teachers[name], attn_implementation=PACKED)
    with torch.no_grad():
        ours = WholeEncoder(model).eval()(*arguments(pack(segments)))
    for layers, hidden in (one_by_one(plain, segments), padded(plain, segments)):
        assert_equal_to_rounding(ours.hidden, hidden)
        for mine, other in zip(ours.qkv, layers[-1], strict=True):
            assert_equal_to_rounding(mine, other)


@each_teacher
def test_the_cut_takes_out_exactly_what_no_gradient_reaches(
    name: str, teachers: dict[str, Path], monkeypatch
) -> None:
    plain = Plain(teachers[name], monkeypatch)
    plain(torch.arange(5, 20)[None], torch.ones(1, 15))
    sum(part.square().sum() for part in plain.qkv[-1]).backward()
    reached = {n: p.shape for n, p in plain.model.named_parameters() if p.grad is not None}
    encoder = CutEncoder(AutoModel.from_pretrained(teachers[name]))
    assert {n: p.shape for n, p in encoder.named_weights().items()} == reached
    assert len(reached) < len(list(plain.model.parameters()))


@each_teacher
def test_a_whole_encoder_keeps_exactly_what_the_last_hidden_state_needs(
    name: str, teachers: dict[str, Path], monkeypatch
) -> None:
    plain = Plain(teachers[name], monkeypatch)
    plain(torch.arange(5, 20)[None], torch.ones(1, 15)).square().sum().backward()
    reached = {n for n, p in plain.model.named_parameters() if p.grad is not None}
    encoder = WholeEncoder(AutoModel.from_pretrained(teachers[name]))
    assert encoder.named_weights().keys() == reached


@each_teacher
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005), ("float8", 0.2)]
)
def test_other_precisions_are_near_fp32(
    name: str, dtype: str, tolerance: float, teachers: dict[str, Path], recipe_of
) -> None:
    batch = pack(random_segments())
    exact = load_teacher(recipe_of(teachers[name]), CPU)(batch)
    teacher = load_teacher(recipe_of(teachers[name], dtype=dtype), CPU)
    for ours, theirs in zip(teacher(batch), exact, strict=True):
        assert ours.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
        error = float((ours.float() - theirs).norm() / theirs.norm())
        assert 0 < error < tolerance


@each_teacher
def test_all_linear_layers_of_a_bf16_teacher_are_prepacked(
    name: str, teachers: dict[str, Path], recipe_of
) -> None:
    plain = load_teacher(recipe_of(teachers[name]), CPU)._encoder
    if not can_prepack(plain.bfloat16()):
        pytest.skip("oneDNN has no bf16 here")
    packed = load_teacher(recipe_of(teachers[name], dtype="bfloat16"), CPU)._encoder
    assert [m for m in plain.modules() if isinstance(m, nn.Linear)]
    assert not [m for m in packed.modules() if isinstance(m, nn.Linear)]


def test_heads_and_weights_beside_the_encoder_are_ignored(
    teachers: dict[str, Path], recipe_of, tmp_path: Path
) -> None:
    whole = load_file(teachers["bge-reranker"] / "model.safetensors")
    assert any(name.startswith("classifier.") for name in whole)
    (tmp_path / "config.json").write_bytes((teachers["bge-reranker"] / "config.json").read_bytes())
    extra = {"sparse_linear.weight": torch.ones(1, 32), "colbert_linear.bias": torch.ones(32)}
    save_file({**whole, **extra}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    batch = pack(random_segments())
    ours, theirs = (
        load_teacher(recipe_of(folder), CPU)(batch)
        for folder in (tmp_path, teachers["bge-reranker"])
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ModernBERT


def test_modernberts_queries_and_keys_give_the_models_own_attention(
    teachers: dict[str, Path], recipe_of, monkeypatch
) -> None:
    plain, ids = Plain(teachers["modernbert"], monkeypatch), random_segments()[2]
    one_by_one(plain, [ids])
    targets, place = [Target(QKV, layer) for layer in range(1, LAYERS + 1)], torch.arange(len(ids))
    teacher, batch = load_teacher(recipe_of(teachers["modernbert"]), CPU, targets), pack([ids])
    all_qkv = [teacher.of(target, batch) for target in targets]
    local = (place[:, None] - place).abs() <= 2
    seen = []
    for layer, qkv in enumerate(all_qkv):
        q, k = (x.unflatten(-1, (2, -1)).transpose(0, 1) for x in (qkv.q, qkv.k))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        kind = plain.model.config.layer_types[layer]
        seen.append(kind)
        if kind == "sliding_attention":
            scores = scores.masked_fill(~local, -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), plain.weights[layer][0])
    assert set(seen) == {"full_attention", "sliding_attention"}


@pytest.mark.parametrize("relation_heads", [2, 4, 8, 16])
def test_modernberts_relations_see_how_far_apart_tokens_are_and_not_where(
    relation_heads: int, teachers: dict[str, Path], recipe_of
) -> None:
    """The first layer's Q of one token again and again differs by its rotation alone."""
    teacher = load_teacher(recipe_of(teachers["modernbert"], layer=1), CPU)
    q = teacher(pack([torch.full((16,), 7)])).q
    q = q.unflatten(-1, (relation_heads, -1)).transpose(0, 1)
    scores = q @ q.transpose(1, 2)
    bound = 1e-5 * float(scores.abs().max())
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=0, atol=bound)
    assert (scores[:, 0, 1:] - scores[:, 0, :1]).abs().max() > 1e3 * bound  # and they do see that


def test_a_configuration_of_modernbert_as_the_hub_has_it(
    teachers: dict[str, Path], recipe_of, tmp_path: Path
) -> None:
    """An older form, with a period and two bases, of a model whose layers are those of `mmbert`."""
    for path in teachers["mmbert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"], config["rope_parameters"]
    older = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
    older |= {"local_rope_theta": 160000.0, "position_embedding_type": "sans_pos"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **older}))
    batch = pack(random_segments())
    for layer in (2, None):
        ours, theirs = (
            load_teacher(recipe_of(folder, layer=layer), CPU)(batch)
            for folder in (tmp_path, teachers["mmbert"])
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Students


@pytest.fixture
def student_of(teachers: dict[str, Path], make_recipe) -> Callable[..., Any]:
    """Configuration and new model of a teacher's student."""

    def build(teacher: str, **student: Any) -> Any:
        section = make_recipe(student={"hidden_size": 24, **student}).student
        config = student_config(section, read_config("teacher.model", str(teachers[teacher])))
        return build_student(section, config, seed=1)

    return build


OWN = {"minilm": "bert", "xlm-r": "xlm-roberta", "e5": "xlm-roberta", "xlm-r-xl": "xlm-roberta"}


@each_teacher
def test_a_student_is_of_its_teachers_architecture_or_the_nearest_plain_one(
    name: str, student_of
) -> None:
    own = {**OWN, "bge-reranker": "xlm-roberta"}.get(name, name)
    expected = own if own in ("bert", "roberta", "camembert", "xlm-roberta") else "bert"
    assert student_of(name).config.model_type == expected


@each_teacher
@each_student
def test_a_new_student_fits_its_teacher_and_loads_as_an_ordinary_model(
    name: str, architecture: str, teachers, student_of, tmp_path: Path, monkeypatch
) -> None:
    model = student_of(name, architecture=architecture, num_hidden_layers=3)
    teacher = AutoConfig.from_pretrained(teachers[name])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == architecture
    assert (config.vocab_size, config.pad_token_id) == (teacher.vocab_size, teacher.pad_token_id)
    assert longest_segment(config) >= longest_segment(teacher)
    plain_teacher = AutoModel.from_pretrained(teachers[name])
    of_student, of_teacher = (
        {m.eps for m in whole.modules() if isinstance(m, nn.LayerNorm)}
        for whole in (model, plain_teacher)
    )
    assert of_student == of_teacher
    shape = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2}
    assert architecture_of(config).shape(config) == {**shape, "intermediate_size": 32}
    assert num_word_embeddings(tmp_path) == VOCABULARY * 24
    assert parameter_shapes(tmp_path) == {n: t.shape for n, t in model.state_dict().items()}

    segments, plain = random_segments(), Plain(tmp_path, monkeypatch)
    with torch.no_grad():
        ours = CutEncoder(model).eval()(*arguments(pack(segments)))
    for mine, other in zip(ours, one_by_one(plain, segments)[0][-1], strict=True):
        assert_equal_to_rounding(mine, other)


@each_student
def test_a_gradient_reaches_every_weight_of_a_cut_student(architecture: str, student_of) -> None:
    encoder = CutEncoder(student_of("mmbert", architecture=architecture)).train()
    sum(part.square().sum() for part in encoder(*arguments(pack(random_segments())))).backward()
    gradients = {name: weight.grad for name, weight in encoder.named_weights().items()}
    # A bias of keys shifts all scores of a query alike, which no softmax sees: zero but for Q, K, V
    # of the last layer, which the loss reads itself.
    seen = {name: g for name, g in gradients.items() if not name.endswith("key.bias")}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for gradient in seen.values())


@each_student
def test_the_recipes_dropout_is_that_of_every_part(architecture: str, student_of) -> None:
    model = student_of(
        "mmbert",
        architecture=architecture,
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.125,
    )
    parts = [m.p for m in model.modules() if hasattr(m, "p")]
    assert set(parts) == {0.25, 0.125}
    encoder, batch = CutEncoder(model), pack(random_segments())
    encoder.train()
    assert not torch.equal(encoder(*arguments(batch)).q, encoder(*arguments(batch)).q)
    encoder.eval()
    assert torch.equal(encoder(*arguments(batch)).q, encoder(*arguments(batch)).q)


def test_a_modernbert_student_alternates_as_its_teacher_does(student_of, teachers) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    for depth in (1, 4, 5):
        student = student_of("mmbert", architecture="modernbert", num_hidden_layers=depth)
        assert student.config.layer_types == kinds[:depth]
        assert student.config.rope_parameters["sliding_attention"]["rope_theta"] == 160000.0
    deeper = student_of("mmbert", architecture="modernbert", num_hidden_layers=7).config
    assert deeper.layer_types == [*kinds[:5], *kinds[:2]]


def test_a_student_whose_architecture_does_not_fit_is_refused(student_of, make_recipe) -> None:
    with pytest.raises(ConfigError, match=r"student\.num_attention_heads=8 leaves heads of 3 "):
        student_of("bert", architecture="modernbert", num_attention_heads=8)
    published = transformers.ModernBertConfig()
    for architecture in ("roberta", "xlm-roberta"):
        section = make_recipe(student={"architecture": architecture}).student
        with pytest.raises(ConfigError, match=rf"student\.architecture={architecture} .* 50283, "):
            student_config(section, published)
    section = make_recipe(student={"architecture": "bert"}).student
    assert student_config(section, published).max_position_embeddings == 8192


def test_a_student_from_a_folder_may_be_of_any_family(teachers, make_recipe) -> None:
    for name, folder in teachers.items():
        section = make_recipe(student={"model": str(folder), "hidden_dropout_prob": 0.25}).student
        model = build_student(section, student_config(section, None), seed=1)
        assert 0.25 in {m.p for m in model.modules() if hasattr(m, "p")}, name
        assert [line.split("=")[0] for line in unused_shape_keys(section, model.config)] == [
            f"student.{key}"
            for key in (
                "num_hidden_layers",
                "hidden_size",
                "num_attention_heads",
                "intermediate_size",
            )
            if key != "num_attention_heads" or name == "minilm"
        ]


def test_an_architecture_that_a_folder_brings_otherwise_is_told() -> None:
    shape = {"num_hidden_layers": 6, "hidden_size": 384}
    shape |= {"num_attention_heads": 12, "intermediate_size": 1536}
    config = SimpleNamespace(model_type="bert", **shape)
    assert unused_shape_keys(Student(model="folder"), config) == []
    assert unused_shape_keys(Student(architecture="roberta"), config) == []
    (told,) = unused_shape_keys(Student(model="folder", architecture="roberta"), config)
    assert told == "student.architecture=roberta (it has bert)"


# What is not known


def test_every_known_architecture_is_compared_with_transformers() -> None:
    tested = {getattr(transformers, c).config_class.model_type for c, _ in TEACHERS.values()}
    assert tested == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.GPT2Config(), "docs/adding_a_teacher.md says how to add one"),
        (transformers.DebertaV2Config(), "terms of relative positions"),
        (transformers.DebertaConfig(), "choose another teacher"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_architectures_are_refused_with_a_reason(
    config: Any, reason: str, tmp_path: Path, repo: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_config("teacher.model", str(tmp_path))
    for part in ("teacher.model", str(tmp_path), repr(config.model_type), reason):
        assert part in str(caught.value)
    if config.model_type == "gpt2":
        assert all(model_type in str(caught.value) for model_type in ARCHITECTURES)
    assert (repo / "docs" / "adding_a_teacher.md").exists()


# Heads of masked language modelling

PREDICTING = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "camembert": "CamembertForMaskedLM",
    "xlm-r": "XLMRobertaForMaskedLM",
    "xlm-r-xl": "XLMRobertaXLForMaskedLM",
    "electra-small": "ElectraForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}


@pytest.mark.parametrize("name", PREDICTING)
def test_logits_are_those_of_segments_alone(
    name: str, tmp_path: Path, recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(TEACHERS[name][1])
    monkeypatch.setitem(TEACHERS, name, (PREDICTING[name], settings))
    folder = save_teacher(name, tmp_path)
    plain = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    segments = random_segments()
    places = torch.tensor([0, 6, 7, 9, 30, 38])
    batch = dataclasses.replace(pack(segments), masked=Masked(places, places))
    teacher = load_teacher(recipe_of(folder, dtype="float32"), CPU, [Target(Predictions, LAYERS)])
    outputs = teacher(batch)
    with torch.no_grad():
        alone = [plain(ids[None], output_hidden_states=True) for ids in segments]
    logits = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(outputs.logits, logits[places], rtol=1e-5, atol=1e-5)
    assert outputs.hidden.shape == (sum(LENGTHS), 32)


def test_every_architecture_predicts() -> None:
    classes = [getattr(transformers, TEACHERS[name][0]) for name in PREDICTING]
    assert {*ARCHITECTURES} == {one.config_class.model_type for one in classes}
