"""Objectives against the papers' formulas in float64 over plain, padded transformers models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from data_prep.command import ConfigError
from pipeline.config import Recipe
from pipeline.loader import Batch, Count, Masked
from pipeline.models import (
    Encoder,
    Target,
    build_student,
    load_teacher,
    pack_encoder,
    read_config,
    student_config,
)
from pipeline.objectives import (
    QKV,
    DistillationObjective,
    MiniLM,
    MiniLMv2,
    Outputs,
    Predictions,
    build_objective,
    cosine_distance,
    mlm_loss,
    soft_target_kl,
)

CPU = torch.device("cpu")
FAMILIES = ("bert", "roberta", "xlm-roberta")
LENGTHS = (7, 1, 12, 3)
MASK_ID, VOCABULARY = 4, 40


# Models, text, and what plain transformers makes of it


def save_model(folder: Path, model_type: str, *, layers: int, width: int, heads: int) -> Path:
    """A random model with its prediction head; every parameter is random."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=20,
        pad_token_id=0 if model_type == "bert" else 1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForMaskedLM.from_config(config)
    generator = torch.Generator().manual_seed(layers + width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(1 + noise if name.lower().endswith("norm.weight") else noise)
    model.save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Models:
    """Folders of a teacher, of a narrow student, and of one as wide as the teacher."""

    teacher: Path
    narrow: Path
    wide: Path


@pytest.fixture(scope="session", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp(request.param)
    return Models(
        save_model(root / "teacher", request.param, layers=3, width=24, heads=3),
        save_model(root / "narrow", request.param, layers=2, width=12, heads=3),
        save_model(root / "wide", request.param, layers=2, width=24, heads=4),
    )


def make_batch(lengths: Sequence[int] = LENGTHS, seed: int = 0, masked: float = 0.3) -> Batch:
    """Random text of some segments, of which some tokens are to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (sum(lengths),), generator=generator)
    (places,) = torch.nonzero(torch.rand(len(ids), generator=generator) < masked, as_tuple=True)
    shown = ids.clone()
    shown[places[::2]] = MASK_ID
    return Batch(
        input_ids=shown[None],
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        first_position=0,
        row_ids=(0,),
        masked=Masked(places, ids[places]),
    )


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a plain model gives of one segment, in float64; A heads, N tokens."""

    q: torch.Tensor  # [N, d]
    k: torch.Tensor
    v: torch.Tensor
    h: torch.Tensor
    attention: torch.Tensor  # [A, N, N]
    logits: torch.Tensor  # [N, V]


def load_plain(folder: Path) -> Any:
    return AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").double().eval()


def run_plain(model: Any, batch: Batch, layer: int) -> list[Segment]:
    """Of a padded batch of the segments; `layer` counts from 1."""
    lengths = batch.cu_seqlens.diff().tolist()
    ids = torch.nn.utils.rnn.pad_sequence(
        batch.input_ids[0].split(lengths),
        batch_first=True,
        padding_value=model.config.pad_token_id,
    )
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    before, after = out.hidden_states[layer - 1], out.hidden_states[layer]
    attention = model.base_model.encoder.layer[layer - 1].attention.self
    projected = [part(before) for part in (attention.query, attention.key, attention.value)]
    return [
        Segment(
            *(vectors[i, :n] for vectors in (*projected, after)),
            attention=out.attentions[layer - 1][i, :, :n, :n],
            logits=out.logits[i, :n],
        )
        for i, n in enumerate(lengths)
    ]


# The formulas


def relation(queries: torch.Tensor, keys: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(X Y^T / sqrt(d/A)), [A, N, N], head by head."""
    width = queries.shape[1] // heads
    parts = zip(queries.split(width, 1), keys.split(width, 1), strict=True)
    return torch.stack([torch.softmax(x @ y.T / math.sqrt(width), dim=-1) for x, y in parts])


def mean_kl(targets: list[torch.Tensor], ours: list[torch.Tensor]) -> torch.Tensor:
    """KL(target || ours) of rows [A, N, N], mean over heads and all segments' rows."""
    rows = [(t * (t.log() - s.log())).sum(-1) for t, s in zip(targets, ours, strict=True)]
    return torch.cat([row.flatten() for row in rows]).mean()


def relation_term(
    term: str, student: list[Segment], teacher: list[Segment], heads: int
) -> torch.Tensor:
    query, key = {"vr": "vv"}.get(term, term)
    return mean_kl(
        *(
            [relation(getattr(s, query), getattr(s, key), heads) for s in segments]
            for segments in (teacher, student)
        )
    )


def attention_term(student: list[Segment], teacher: list[Segment]) -> torch.Tensor:
    """Of what the models attend with, as they say themselves."""
    return mean_kl([s.attention for s in teacher], [s.attention for s in student])


def distilbert_terms(
    student: list[Segment], teacher: list[Segment], masked: Masked, temperature: float
) -> dict[str, torch.Tensor]:
    places, labels = masked
    s, t = (torch.cat([x.logits for x in segments])[places] for segments in (student, teacher))
    soft_s, soft_t = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
    terms = {
        "ce": temperature**2 * (soft_t * (soft_t.log() - soft_s.log())).sum(-1).mean(),
        "mlm": -torch.softmax(s, -1)[torch.arange(len(labels)), labels].log().mean(),
    }
    h_s, h_t = (torch.cat([x.h for x in segments]) for segments in (student, teacher))
    if h_s.shape == h_t.shape:
        cosine = (h_s * h_t).sum(-1) / (h_s.norm(dim=-1) * h_t.norm(dim=-1))
        terms["cos"] = (1 - cosine).mean()
    return terms


# What training computes


@dataclasses.dataclass(frozen=True)
class Ours:
    """The recipe's objective with its packed models, in fp32."""

    objective: DistillationObjective
    teacher: Any
    student: Encoder

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        outputs = self.student(*batch.inputs[: 5 if self.objective.mask_probability else 4])
        return self.objective.losses(outputs, self.teacher(self.seen(batch)), batch)

    def seen(self, batch: Batch) -> Batch:
        return batch if self.objective.mask_probability else dataclasses.replace(batch, masked=None)

    def gradients(self) -> dict[str, torch.Tensor]:
        """By the names of the whole model's parameters, without the base model's prefix."""
        return {
            plain_name(name): weight.grad
            for name, weight in self.student.named_weights().items()
            if weight.grad is not None
        }


def plain_name(name: str) -> str:
    return name.removeprefix("bert.").removeprefix("roberta.")


@pytest.fixture
def assemble(make_recipe: Callable[..., Recipe]) -> Callable[..., Ours]:
    def make(teacher: Path, student: Path, layer: int | None = None, **objective: Any) -> Ours:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        recipe = make_recipe(
            teacher={"model": str(teacher), "layer": layer},
            student={"model": str(student), **dropout},
            objective=objective,
        )
        teacher_config = read_config("teacher.model", str(teacher))
        config = student_config(recipe.student, teacher_config)
        built = build_objective(recipe, teacher_config, config)
        model = build_student(recipe.student, config, 1, built.needs)
        encoder = pack_encoder(model, built.needs, built.projections)
        target = Target(built.teacher_needs, layer or teacher_config.num_hidden_layers)
        return Ours(built, load_teacher(recipe, CPU, [target]), encoder.train())

    return make


def assert_equal(ours: Ours, expected: dict[str, torch.Tensor], plain: Any, batch: Batch) -> None:
    """Losses to 1e-5 and all gradients to 1e-4 of the plain student's, which has no others."""
    losses = ours.losses(batch)
    assert losses.keys() == expected.keys() == ours.objective.weights.keys()
    for term, loss in losses.items():
        assert loss.dtype == torch.float32
        assert expected[term].item() > 1e-2  # not a comparison of zeros
        assert loss.item() == pytest.approx(expected[term].item(), rel=1e-5), term
    weights = ours.objective.weights
    ours.objective.total(losses).backward()
    torch.stack([weights[term] * loss for term, loss in expected.items()]).sum().backward()
    gradients = ours.gradients()
    reached = {
        plain_name(name): p.grad for name, p in plain.named_parameters() if p.grad is not None
    }
    assert ours.student.named_weights().keys() == {
        name for name in ours.student.named_weights() if plain_name(name) in gradients
    }
    if "lm_head.decoder.weight" in reached:  # shared with the embedding, whose name ours has
        reached["embeddings.word_embeddings.weight"] = reached.pop("lm_head.decoder.weight")
    assert gradients.keys() == reached.keys()
    largest = max(float(g.abs().max()) for g in reached.values())
    for name, gradient in reached.items():
        torch.testing.assert_close(
            gradients[name].double(), gradient, rtol=1e-4, atol=1e-5 * largest, msg=name
        )


# MiniLMv2

ALL = {query + key: 0.5 + i for i, query in enumerate("qkv") for key in "qkv"}


@pytest.mark.parametrize("layer", [2, None])
@pytest.mark.parametrize(
    "relations",
    [
        {"qq": 1.0, "kk": 1.0, "vv": 1.0},
        ALL,
        {"hh": 1.0},
        {**ALL, "hh": 2.0},
        {"vv": 1.0},
        {"qk": 1.0},
        {"vq": 1.0},
    ],
    ids=["default", "nine", "hh", "ten", "vv", "qk", "vq"],
)
def test_minilmv2_is_the_formula_over_plain_models(
    relations: dict[str, float], layer: int | None, models: Models, assemble: Callable[..., Ours]
) -> None:
    ours = assemble(models.teacher, models.narrow, layer, relations=relations, num_relation_heads=6)
    batch, plain = make_batch(), load_plain(models.narrow)
    teacher = run_plain(load_plain(models.teacher), batch, layer or 3)
    student = run_plain(plain, batch, 2)
    expected = {term: relation_term(term, student, teacher, 6) for term in relations}
    assert_equal(ours, expected, plain, batch)


def test_query_and_key_side_are_not_the_same(assemble: Callable[..., Ours], models: Models) -> None:
    ours = assemble(models.teacher, models.narrow, relations=ALL, num_relation_heads=6)
    losses = [loss.item() for loss in ours.losses(make_batch()).values()]
    assert len(set(losses)) == 9


@pytest.mark.parametrize(
    ("relations", "needs", "projections"),
    [
        ({"qq": 1.0, "kk": 1.0, "vv": 1.0}, QKV, "qkv"),
        ({"vv": 1.0, "qq": 0.0}, QKV, "v"),
        ({"vq": 1.0}, QKV, "qv"),
        ({"vv": 1.0, "hh": 0.0}, QKV, "v"),
        ({"vv": 1.0, "hh": 1.0}, Outputs, "qkv"),
    ],
)
def test_what_no_relation_asks_for_is_neither_computed_nor_trained(
    relations: dict[str, float],
    needs: type,
    projections: str,
    make_recipe: Callable[..., Recipe],
    make_objective: Callable[..., DistillationObjective],
) -> None:
    objective = make_objective(make_recipe(objective={"relations": relations}))
    assert (objective.needs, objective.projections) == (needs, projections)
    assert list(objective.weights) == sorted(r for r in relations if relations[r])


@pytest.mark.parametrize(
    ("heads", "whose", "width"), [(48, "teacher", 1024), (256, "student", 384)]
)
def test_relation_heads_that_do_not_divide_a_width_are_refused(
    heads: int,
    whose: str,
    width: int,
    make_recipe: Callable[..., Recipe],
    make_objective: Callable[..., DistillationObjective],
) -> None:
    recipe = make_recipe(objective={"num_relation_heads": heads})
    with pytest.raises(ConfigError) as caught:
        make_objective(recipe, teacher=1024, student=384)
    message = str(caught.value)
    assert f"objective.num_relation_heads={heads} does not divide the {whose}'s" in message
    assert str(width) in message
    assert "use one of [1, 2, 4, 8, 16, 32, 64, 128]" in message


# MiniLM


@pytest.mark.parametrize("layer", [2, None])
@pytest.mark.parametrize("hh", [0.0, 1.0])
def test_minilm_is_the_models_own_attention_and_the_value_relation(
    hh: float, layer: int | None, models: Models, assemble: Callable[..., Ours]
) -> None:
    relations = {"at": 1.0, "vr": 1.0, "hh": hh}
    ours = assemble(models.teacher, models.narrow, layer, name="minilm", relations=relations)
    batch, plain = make_batch(), load_plain(models.narrow)
    teacher = run_plain(load_plain(models.teacher), batch, layer or 3)
    student = run_plain(plain, batch, 2)
    expected = {"at": attention_term(student, teacher)}
    expected["vr"] = relation_term("vr", student, teacher, 3)
    if hh:
        expected["hh"] = relation_term("hh", student, teacher, 3)
    assert_equal(ours, expected, plain, batch)


def test_minilm_wants_as_many_attention_heads(
    models: Models, make_recipe: Callable[..., Recipe]
) -> None:
    configs = [AutoConfig.from_pretrained(folder) for folder in (models.teacher, models.wide)]
    with pytest.raises(ConfigError) as caught:
        build_objective(make_recipe(objective={"name": "minilm"}), *configs)
    for part in ("student.num_attention_heads=4", "teacher's 3", "use 3", "minilmv2"):
        assert part in str(caught.value)
    configs[1].num_attention_heads = 3
    built = build_objective(make_recipe(objective={"name": "minilm"}), *configs)
    assert isinstance(built, MiniLM)
    assert built.weights == {"at": 1.0, "vr": 1.0}


# Both


@pytest.mark.parametrize(("name", "terms"), [("minilmv2", "kk"), ("minilm", "at")])
def test_the_recipe_decides_heads_and_implementation(
    name: str,
    terms: str,
    make_recipe: Callable[..., Recipe],
    make_objective: Callable[..., DistillationObjective],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def spy(*arguments: Any, implementation: str, **keys: Any) -> torch.Tensor:
        calls.append((arguments[3], implementation))
        return torch.zeros(())

    monkeypatch.setattr("pipeline.objectives.relation_kl", spy)
    chosen = {"num_relation_heads": 2, "relation_kl": "reference", "relations": {terms: 1.0}}
    objective = make_objective(make_recipe(objective={"name": name, **chosen}))
    qkv = QKV(*(torch.zeros(23, 8) for _ in range(3)))
    objective.losses(qkv, qkv, make_batch())
    assert calls == [(2 if name == "minilmv2" else 4, "reference")]


# DistilBERT


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("student", "losses"),
    [
        ("wide", {"ce": 5.0, "mlm": 2.0, "cos": 1.0}),
        ("narrow", {"ce": 5.0, "mlm": 2.0, "cos": 0.0}),
        ("wide", {"ce": 0.0, "mlm": 1.0, "cos": 0.5}),
    ],
)
def test_distilbert_is_the_formula_over_plain_models(
    student: str,
    losses: dict[str, float],
    temperature: float,
    models: Models,
    assemble: Callable[..., Ours],
) -> None:
    folder = getattr(models, student)
    ours = assemble(
        models.teacher, folder, name="distilbert", losses=losses, temperature=temperature
    )
    batch, plain = make_batch(), load_plain(folder)
    assert batch.masked is not None
    with torch.no_grad():
        teacher = run_plain(load_plain(models.teacher), batch, 3)
    terms = distilbert_terms(run_plain(plain, batch, 2), teacher, batch.masked, temperature)
    expected = {term: terms[term] for term, weight in losses.items() if weight}
    assert_equal(ours, expected, plain, batch)


def test_distilbert_reaches_every_parameter_and_predicts_at_masks_alone(
    models: Models, assemble: Callable[..., Ours]
) -> None:
    ours, batch = assemble(models.teacher, models.wide, name="distilbert"), make_batch()
    assert batch.masked is not None
    predictions = ours.student(*batch.inputs)
    assert isinstance(predictions, Predictions)
    assert predictions.logits.shape == (len(batch.masked.places), VOCABULARY)
    assert predictions.hidden.shape == (sum(LENGTHS), 24)
    ours.objective.total(ours.losses(batch)).backward()
    whole = AutoModelForMaskedLM.from_pretrained(models.wide)
    assert len(ours.gradients()) == len(dict(whole.named_parameters()))


def test_without_soft_targets_the_teacher_needs_no_head(
    models: Models, assemble: Callable[..., Ours], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(models.teacher).save_pretrained(tmp_path)
    batch, losses = make_batch(), {"mlm": 2.0, "cos": 1.0}
    whole = assemble(models.teacher, models.wide, name="distilbert", losses=losses).losses(batch)
    headless = assemble(tmp_path, models.wide, name="distilbert", losses=losses).losses(batch)
    assert {term: loss.item() for term, loss in headless.items()} == {
        term: loss.item() for term, loss in whole.items()
    }
    with pytest.raises(ConfigError, match="head of masked language"):
        assemble(tmp_path, models.wide, name="distilbert")


@pytest.mark.parametrize("splits", [[(7, 1), (12, 3)], [(7,), (1,), (12,), (3,)]])
def test_the_steps_value_does_not_depend_on_how_it_is_split(
    splits: list[tuple[int, ...]], models: Models, assemble: Callable[..., Ours]
) -> None:
    """Some parts hold many masked tokens, one none at all."""
    ours, whole = assemble(models.teacher, models.wide, name="distilbert"), make_batch()
    parts = split(whole, splits)
    counts = [part.count for part in parts]
    assert Count.sum(counts) == whole.count
    assert len({count.masked / count.tokens for count in counts}) > 1
    expected = ours.losses(whole)
    ours.objective.total(expected).backward()
    gradients = {name: gradient.clone() for name, gradient in ours.gradients().items()}
    ours.student.zero_grad()
    sums = dict.fromkeys(expected, 0.0)
    for part in parts:
        shares = ours.objective.shares(part.count, whole.count)
        scaled = {term: loss * shares[term] for term, loss in ours.losses(part).items()}
        ours.objective.total(scaled).backward()
        sums = {term: sums[term] + loss.item() for term, loss in scaled.items()}
    assert sums == pytest.approx({term: loss.item() for term, loss in expected.items()}, rel=1e-5)
    for name, gradient in ours.gradients().items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5)


def split(whole: Batch, splits: list[tuple[int, ...]]) -> list[Batch]:
    assert whole.masked is not None
    parts, start = [], 0
    for lengths in splits:
        stop = start + sum(lengths)
        inside = (whole.masked.places >= start) & (whole.masked.places < stop)
        masked = Masked(whole.masked.places[inside] - start, whole.masked.labels[inside])
        part = dataclasses.replace(
            make_batch(lengths), input_ids=whole.input_ids[:, start:stop], masked=masked
        )
        parts.append(part)
        start = stop
    return parts


def test_a_batch_without_masked_tokens_has_losses_and_gradients_of_0(
    models: Models, assemble: Callable[..., Ours]
) -> None:
    ours = assemble(models.teacher, models.wide, name="distilbert")
    losses = ours.losses(make_batch(masked=0.0))
    assert losses["ce"] == losses["mlm"] == 0.0
    ours.objective.total(losses).backward()
    assert all(gradient.isfinite().all() for gradient in ours.gradients().values())
    assert ours.objective.shares(Count(5, 0), Count(9, 0)) == {"ce": 0, "cos": 5 / 9, "mlm": 0}


@pytest.mark.parametrize(
    ("teacher", "student", "losses", "named"),
    [
        ({"layer": 2}, {}, {}, ["teacher.layer=2", "null or 3"]),
        ({}, {"vocab_size": 41}, {}, ["41 ids", "40", "teacher's vocabulary"]),
        ({}, {"hidden_size": 12}, {}, ["student.hidden_size=12", "use 24", "objective.losses.cos"]),
    ],
)
def test_models_that_distilbert_cannot_compare_are_refused(
    teacher: dict[str, Any],
    student: dict[str, int],
    losses: dict[str, float],
    named: list[str],
    make_recipe: Callable[..., Recipe],
) -> None:
    shape = {"hidden_size": 24, "vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    configs = [SimpleNamespace(**shape), SimpleNamespace(**{**shape, **student})]
    recipe = make_recipe(teacher=teacher, objective={"name": "distilbert"})
    with pytest.raises(ConfigError) as caught:
        build_objective(recipe, *configs)
    assert all(part in str(caught.value) for part in named), str(caught.value)
    without_cos = {"name": "distilbert", "losses": {"ce": 1.0, "cos": 0.0}}
    if "hidden_size" in student:
        build_objective(make_recipe(objective=without_cos), *configs)


# Terms by themselves


def test_equal_outputs_cost_nothing_but_the_masked_tokens() -> None:
    logits, hidden = torch.randn(5, VOCABULARY), torch.randn(9, 8)
    assert float(soft_target_kl(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(hidden, 3 * hidden)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(hidden, -hidden)) == pytest.approx(2)
    sure = torch.full((2, 3), -1e4).scatter(1, torch.tensor([[1], [2]]), 1e4)
    assert float(mlm_loss(sure, torch.tensor([1, 2]))) == 0


def test_the_gradient_of_soft_targets_keeps_its_size_for_any_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 50, VOCABULARY, generator=generator).double() * 0.1
    norms = []
    for temperature in (1.0, 10.0):
        logits = student.clone().requires_grad_()
        soft_target_kl(logits, teacher, temperature).backward()
        assert logits.grad is not None
        norms.append(float(logits.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 6, VOCABULARY).to(dtype)
    labels = torch.arange(6)
    for loss, exact in (
        (soft_target_kl(student, teacher, 2.0), soft_target_kl(student.double(), teacher, 2.0)),
        (cosine_distance(student, teacher), cosine_distance(student.double(), teacher)),
        (mlm_loss(student, labels), mlm_loss(student.double(), labels)),
    ):
        assert (loss.dtype, exact.dtype) == (torch.float32, torch.float64)
        assert loss.item() == pytest.approx(float(exact), rel=1e-5)


def test_the_total_is_the_weighted_sum(
    make_recipe: Callable[..., Recipe], make_objective: Callable[..., DistillationObjective]
) -> None:
    relations = {"qq": 0.5, "kk": 10.0, "vv": 1.0}
    objective = make_objective(make_recipe(objective={"relations": relations}))
    assert isinstance(objective, MiniLMv2)
    losses = {name: torch.tensor(loss) for name, loss in (("kk", 2.0), ("qq", 3.0), ("vv", 5.0))}
    assert objective.total(losses) == 20.0 + 1.5 + 5.0
