from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    XLMRobertaConfig,
)

from data_prep.command import ConfigError
from pipeline import initialise
from pipeline.config import Student
from pipeline.initialise import (
    WORDS,
    check_start,
    copied_layers,
    embedding_basis,
    leading_directions,
    projected_layers,
    start_layers,
)
from pipeline.models import build_student, keep_tokens, start_from_teacher, student_config
from pipeline.objectives import QKV

FAMILIES = ("bert", "roberta", "camembert", "xlm-roberta")
each_family = pytest.mark.parametrize("family", FAMILIES)
SAME = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
WHOLE = Student(num_hidden_layers=3, **SAME)
NARROW = Student(
    num_hidden_layers=3, hidden_size=12, num_attention_heads=3, intermediate_size=20, init="svd"
)
EACH = [1, 2, 3]
HEADS, WIDTH = 3, 8  # of the tiny teachers

State = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def teacher(tiny_models: dict[str, Path]) -> State:
    """A random teacher's state: three layers of width 24, three heads, 40 neurons, 40 tokens."""
    return state_of(tiny_models["xlm-roberta"])


def state_of(folder: Path) -> State:
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return dict(model.state_dict())


def basis_of(teacher: State, start: State) -> torch.Tensor:
    """B from E B, as E has as many independent rows as columns; float64."""
    return torch.linalg.lstsq(teacher[WORDS].double(), start[WORDS].double()).solution


# Embeddings


@pytest.mark.parametrize("width", [1, 7, 23])
def test_the_embedding_is_the_best_of_its_rank(width: int) -> None:
    """Eckart and Young: what is lost are the singular values that are left out."""
    words = random(300, 24) * torch.logspace(0, -2, 24) + 0.5
    basis = embedding_basis(words, width)
    projected = words.double() @ basis
    lost = torch.linalg.matrix_norm(words.double() - projected @ basis.T)
    values = torch.linalg.svdvals(words.double())
    torch.testing.assert_close(lost, values[width:].square().sum().sqrt(), rtol=1e-9, atol=0)
    # U S: orthogonal columns as long as the singular values, the strongest first.
    gram = projected.T @ projected
    torch.testing.assert_close(gram, values[:width].square().diag(), rtol=1e-9, atol=1e-9)


def test_signs_are_fixed_and_rows_may_come_in_chunks(monkeypatch) -> None:
    words = random(300, 24)
    basis = embedding_basis(words, 10)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(embedding_basis(-words, 10), basis)
    monkeypatch.setattr(initialise, "CHUNK_ROWS", 7)
    torch.testing.assert_close(embedding_basis(words, 10), basis, rtol=1e-9, atol=1e-9)


def test_all_directions_are_the_coordinates() -> None:
    vectors = random(5, 9).double()
    assert torch.equal(leading_directions(vectors @ vectors.T, 5), torch.eye(5).double())


def test_all_embeddings_are_in_the_same_basis(teacher: State) -> None:
    start = projected_layers(teacher, EACH, NARROW, HEADS)
    basis = basis_of(teacher, start)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12).double(), rtol=1e-5, atol=1e-5)
    for name in ("position", "token_type"):
        table = f"embeddings.{name}_embeddings.weight"
        expected = (teacher[table].double() @ basis).float()
        torch.testing.assert_close(start[table], expected, rtol=1e-4, atol=1e-5)


def test_layer_norms_keep_what_a_diagonal_can(teacher: State) -> None:
    start = projected_layers(teacher, EACH, NARROW, HEADS)
    basis = basis_of(teacher, start).float()
    norms = [name.removesuffix(".weight") for name in teacher if name.endswith("LayerNorm.weight")]
    assert len(norms) == 7
    for norm in norms:
        gains = basis.T @ teacher[f"{norm}.weight"].diag() @ basis
        torch.testing.assert_close(start[f"{norm}.weight"], gains.diag(), rtol=1e-4, atol=1e-5)
        bias = basis.T @ teacher[f"{norm}.bias"]
        torch.testing.assert_close(start[f"{norm}.bias"], bias, rtol=1e-4, atol=1e-5)


# Whole layers


@each_family
@pytest.mark.parametrize("init", ["layers", "svd"])
def test_a_start_of_the_teachers_shape_computes_what_the_teacher_does(
    init: str, family: str, tiny_models: dict[str, Path], make_recipe: Callable[..., Any]
) -> None:
    ids = torch.randint(5, 40, (2, 15), generator=torch.Generator().manual_seed(1))
    for layers in (EACH, [1, 3]):
        shape = {"num_hidden_layers": len(layers), "init_layers": layers, "init": init, **SAME}
        recipe = make_recipe(teacher={"model": str(tiny_models[family])}, student=shape)
        config = student_config(recipe.student, AutoConfig.from_pretrained(tiny_models[family]))
        student = build_student(recipe.student, config, seed=1)
        start_from_teacher(student, recipe, QKV, None)
        plain = AutoModel.from_config(config, attn_implementation="eager").eval()
        plain.load_state_dict(student.state_dict())
        cut = AutoModel.from_pretrained(tiny_models[family], attn_implementation="eager").eval()
        cut.encoder.layer = torch.nn.ModuleList(cut.encoder.layer[layer - 1] for layer in layers)
        with torch.no_grad():
            ours, teachers = plain(ids).last_hidden_state, cut(ids).last_hidden_state
        assert torch.equal(ours, teachers)


def test_every_weight_but_the_poolers_is_started(
    tiny_models: dict[str, Path], make_recipe: Callable[..., Any]
) -> None:
    shape = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "init": "svd"}
    recipe = make_recipe(teacher={"model": str(tiny_models["bert"])}, student=shape)
    config = student_config(recipe.student, AutoConfig.from_pretrained(tiny_models["bert"]))
    student = build_student(recipe.student, config, seed=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    start_from_teacher(student, recipe, QKV, None)
    same = {name for name, t in student.state_dict().items() if torch.equal(t, before[name])}
    assert same == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_trimmed_student_starts_from_the_kept_rows(
    tiny_models: dict[str, Path], make_recipe: Callable[..., Any], teacher: State
) -> None:
    kept = torch.tensor([0, 1, 2, 3, 7, 11, 12, 20, 30, 31, 32, 33, 34, 35, 36, 37, 38])
    for init, width in (("layers", 24), ("svd", 12)):
        shape = {**SAME, "hidden_size": width, "init": init}
        folder = tiny_models["xlm-roberta"]
        recipe = make_recipe(teacher={"model": str(folder)}, student=shape)
        config = student_config(recipe.student, AutoConfig.from_pretrained(folder))
        student = build_student(recipe.student, config, seed=1)
        keep_tokens(student, kept)
        start_from_teacher(student, recipe, QKV, kept)
        words = student.embeddings.word_embeddings.weight.detach()
        if init == "layers":
            assert torch.equal(words, teacher[WORDS][kept])
        else:  # the best for these rows, not for all
            values = torch.linalg.svdvals(teacher[WORDS][kept].double())
            norm = torch.linalg.matrix_norm(words.double())
            torch.testing.assert_close(norm, values[:12].square().sum().sqrt(), rtol=1e-6, atol=0)


def test_layers_are_spread_evenly_up_to_the_imitated_one() -> None:
    def spread(student: int, last: int) -> list[int]:
        return start_layers(Student(num_hidden_layers=student), last)

    assert spread(6, 12) == [2, 4, 6, 8, 10, 12]
    assert spread(6, 19) == [4, 7, 10, 13, 16, 19]
    assert spread(3, 3) == [1, 2, 3]
    assert spread(1, 5) == [5]
    assert start_layers(Student(num_hidden_layers=2, init_layers=[3, 1]), 3) == [3, 1]


def test_layers_are_copied_in_the_order_named(teacher: State) -> None:
    copied = copied_layers(teacher, [3, 1])
    name = "encoder.layer.{}.output.dense.weight"
    assert torch.equal(copied[name.format(0)], teacher[name.format(2)])
    assert torch.equal(copied[name.format(1)], teacher[name.format(0)])
    assert not any("layer.2." in key for key in copied)
    assert {key for key in teacher if "embeddings" in key} <= copied.keys()


# Narrower layers, on teachers from which nothing needs to be lost


def hidden_pair(teacher: State, start: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden vectors of the student, [5, 12], and what they stand for in the teacher, [5, 24]."""
    hidden = random(5, 12, seed=3).double()
    return hidden, hidden @ basis_of(teacher, start).T


def linear(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    return inputs @ weight.T + bias


def heads_of(state: State, name: str, inputs: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[heads, tokens, width]."""
    name = f"encoder.layer.0.attention.self.{name}"
    return linear(state, name, inputs).unflatten(1, (num_heads, -1)).transpose(0, 1)


def shrink_heads(teacher: State, rank: int) -> None:
    """Let each head's queries and keys lie in the same few of its dimensions, its values too."""
    for spaces, names in ((1, ("query", "key")), (2, ("value",))):
        space = random(HEADS, WIDTH, rank, seed=spaces)
        for seed, name in enumerate(names, start=10 * spaces):
            prefix = f"encoder.layer.0.attention.self.{name}"
            rows = space @ random(HEADS, rank, 25, seed=seed)
            teacher[f"{prefix}.weight"] = rows[..., :-1].flatten(0, 1)
            teacher[f"{prefix}.bias"] = rows[..., -1].flatten()


def test_heads_of_low_rank_keep_their_scores_and_outputs(teacher: State) -> None:
    shrink_heads(teacher, rank=4)
    start = projected_layers(teacher, EACH, NARROW, HEADS)
    ours, theirs = hidden_pair(teacher, start)
    scores = []
    for state, hidden, width in ((start, ours, 4), (teacher, theirs, WIDTH)):
        query, key = (heads_of(state, name, hidden, HEADS) for name in ("query", "key"))
        scores.append(query @ key.mT / width**0.5)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    output = "encoder.layer.0.attention.output.dense"
    weights = torch.softmax(scores[1], dim=-1)
    mine = weights @ heads_of(start, "value", ours, HEADS)
    teachers = weights @ heads_of(teacher, "value", theirs, HEADS)
    mine = linear(start, output, mine.transpose(0, 1).flatten(1))
    teachers = linear(teacher, output, teachers.transpose(0, 1).flatten(1))
    basis = basis_of(teacher, start)
    torch.testing.assert_close(mine, teachers @ basis, rtol=1e-4, atol=1e-4)


def test_the_relations_between_values_are_kept_too(teacher: State) -> None:
    """Of queries and keys they are scaled: what MiniLMv2's V-V relation is made of."""
    shrink_heads(teacher, rank=4)
    start = projected_layers(teacher, EACH, NARROW, HEADS)
    ours, theirs = hidden_pair(teacher, start)
    for name, scale in (("value", 1.0), ("query", 2**-0.5), ("key", 2**-0.5)):
        mine = heads_of(start, name, ours, HEADS)
        teachers = heads_of(teacher, name, theirs, HEADS)
        torch.testing.assert_close(
            mine @ mine.mT, scale * teachers @ teachers.mT, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("weakest", [0, 1, 2])
def test_the_weakest_heads_are_left_out(weakest: int, teacher: State) -> None:
    output = teacher["encoder.layer.0.attention.output.dense.weight"]
    output[:, weakest * WIDTH : (weakest + 1) * WIDTH] *= 1e-3
    student = Student(
        num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=40
    )
    start = projected_layers(teacher, EACH, student, HEADS)
    basis = basis_of(teacher, start)
    rows = [i for i in range(24) if i // WIDTH != weakest]
    for name in ("query", "key", "value"):
        weight = f"encoder.layer.0.attention.self.{name}.weight"
        expected = (teacher[weight][rows].double() @ basis).float()
        torch.testing.assert_close(start[weight], expected, rtol=1e-4, atol=1e-5)


def test_neurons_that_do_nothing_are_left_out(teacher: State) -> None:
    into, out = "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"
    idle = torch.arange(0, 40, 2)
    teacher[f"{out}.weight"][:, idle[:10]] = 0
    teacher[f"{into}.weight"][idle[10:]] = 0
    teacher[f"{into}.bias"][idle[10:]] = 0  # gelu(0) = 0
    start = projected_layers(teacher, EACH, NARROW, HEADS)
    ours, theirs = hidden_pair(teacher, start)
    results = [
        linear(state, out, torch.nn.functional.gelu(linear(state, into, hidden)))
        for state, hidden in ((start, ours), (teacher, theirs))
    ]
    assert start[f"{into}.bias"].shape == (20,)
    expected = results[1] @ basis_of(teacher, start)
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)


def test_the_same_teacher_gives_the_same_bits(teacher: State) -> None:
    first, second = (projected_layers(teacher, EACH, NARROW, HEADS) for _ in range(2))
    assert first.keys() == second.keys() == teacher.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init": "layers", "hidden_size": 12}, ["student.hidden_size=12", "24", "init=svd"]),
        ({"init": "layers", "num_attention_heads": 6}, ["num_attention_heads=6", "init=svd"]),
        ({"init": "layers", "intermediate_size": 20}, ["intermediate_size=20", "init=svd"]),
        ({"init": "svd", "hidden_size": 48}, ["hidden_size=48", "24", "init=random"]),
        ({"init": "svd", "num_attention_heads": 4}, ["num_attention_heads=4", "init=random"]),
        ({"init": "svd", "intermediate_size": 41}, ["intermediate_size=41", "init=random"]),
        ({"init": "svd", "num_attention_heads": 2}, ["= 12 is wider", "of 8", "more heads"]),
        ({"init": "layers", "num_hidden_layers": 4}, ["num_hidden_layers=4", "init_layers"]),
        ({"init": "layers", "init_layers": [1, 2, 4]}, ["init_layers has 4", "1 to 3"]),
        ({"init": "svd", "init_layers": [0, 1, 2]}, ["init_layers has 0", "1 to 3"]),
    ],
)
def test_a_start_that_the_shapes_do_not_allow_is_refused(
    changes: dict[str, Any], named: list[str], tiny_models: dict[str, Path]
) -> None:
    config = AutoConfig.from_pretrained(tiny_models["bert"])
    student = Student(**{"num_hidden_layers": 3, **SAME, **changes})
    with pytest.raises(ConfigError) as caught:
        check_start(student, config, config, last=3)
    assert all(part in str(caught.value) for part in named), caught.value


def test_what_the_shapes_allow_is_not_refused(tiny_models: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_models["bert"])
    check_start(WHOLE, config, config, last=3)
    check_start(NARROW, config, config, last=3)
    repeated = Student(num_hidden_layers=4, init="layers", init_layers=[1, 1, 2, 2], **SAME)
    check_start(repeated, config, config, last=3)
    check_start(Student(num_hidden_layers=99), DistilBertConfig(), DistilBertConfig(), last=6)


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"init=svd does not know.*'distilbert'.*init=random"):
        check_start(NARROW, DistilBertConfig(), DistilBertConfig(), last=6)


def test_another_architecture_than_the_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student\.architecture=bert is not the teacher's"):
        check_start(NARROW, BertConfig(), XLMRobertaConfig(), last=6)
