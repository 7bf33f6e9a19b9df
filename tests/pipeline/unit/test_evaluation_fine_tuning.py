"""The whole model with a head: batches of any lengths, one step of each kind, vectors of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from pipeline.evaluation import speed
from pipeline.evaluation.fine_tuning import (
    Source,
    Training,
    _with_head,
    embeddings,
    fine_tune,
    logits_of,
)
from pipeline.evaluation.kinds import kind_of
from pipeline.evaluation.layouts import Answer, Example
from pipeline.evaluation.tasks import TASKS

TEXTS = ("Ja.", "No, not at all, and never again in this town.", "So be it.", "Où ? " * 9)
EXAMPLES: dict[str, list[Example]] = {
    "rte": [Example(str(i), (text, TEXTS[0]), i % 2) for i, text in enumerate(TEXTS)],
    "stsb": [Example(str(i), (text, TEXTS[1]), i / 2) for i, text in enumerate(TEXTS)],
    "xcopa": [Example(str(i), (text, *TEXTS[1:3]), i % 2) for i, text in enumerate(TEXTS)],
    "squad": [Example(str(i), ("Why?", text), (Answer(text[:2], 0),))
              for i, text in enumerate(TEXTS)],
    "wikiann": [Example(str(i), tuple(text.split()), ("O",) * len(text.split()))
                for i, text in enumerate(TEXTS)],
}  # fmt: skip
LABELS = {"rte": ("a", "b"), "xcopa": ("0", "1"), "wikiann": ("O", "B-LOC")}


@pytest.fixture(scope="module")
def source(pocket_teacher: Path) -> Source:
    return Source(str(pocket_teacher), "--model")


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_logits_of_a_batch_are_those_of_each_input_alone(name: str, source: Source) -> None:
    kind = kind_of(TASKS[name], LABELS.get(name, ()), source.tokenizer(), 64)
    torch.manual_seed(0)
    model = _with_head(source, kind).eval()
    rows = [row for row, _ in kind.inputs(EXAMPLES[name], training=False)]
    found = logits_of(model, kind.tokenizer, rows)
    assert len({len(row["input_ids"]) for row in rows}) > 1 or name == "xcopa"
    for row, outputs in zip(rows, found, strict=True):
        with torch.no_grad():
            if name == "xcopa":  # the head scores each answer by itself
                alone = [model(input_ids=torch.tensor([[ids]])).logits for ids in row["input_ids"]]
                expected: Any = [torch.cat(alone, dim=1)]
            else:
                given = model(input_ids=torch.tensor([row["input_ids"]]))
                expected = [given[key] for key in ("logits", "start_logits", "end_logits")
                            if key in given]  # fmt: skip
        for ours, theirs in zip(outputs, expected, strict=True):
            size = theirs.shape[1] if ours.ndim == theirs.ndim - 1 else None
            assert ours[:size] == pytest.approx(theirs[0].numpy(), abs=1e-5)


@pytest.fixture(scope="module")
def tiny(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A random model with dropout, and the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=16000, hidden_size=16, num_hidden_layers=2,
                              num_attention_heads=2, intermediate_size=16, pad_token_id=1,
                              bos_token_id=0, eos_token_id=2)  # fmt: skip
    XLMRobertaModel(config).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    return Source(str(folder), "--model")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_kind_trains_and_a_seed_decides_everything(name: str, tiny: Source) -> None:
    kind = kind_of(TASKS[name], LABELS.get(name, ()), tiny.tokenizer(), 64)
    rows = [row for row, _ in kind.inputs(EXAMPLES[name], training=True)]

    def train(seed: int, rate: float = 1e-2) -> dict[str, torch.Tensor]:
        training = Training(learning_rate=rate, epochs=3, seed=seed)
        found: dict[str, torch.Tensor] = fine_tune(tiny, kind, rows, training).state_dict()
        return found

    once, again, other, still = train(1), train(1), train(2), train(1, 1e-12)
    assert all(torch.equal(once[key], again[key]) for key in once)
    body = "roberta.encoder.layer.0.attention.self.value.weight"
    assert not torch.equal(once[body], other[body])  # from the same start, with other dropout
    assert not torch.allclose(once[body], still[body])
    heads = [key for key in once if not key.startswith("roberta.") and key.endswith("weight")]
    assert heads
    assert not any(torch.allclose(still[key], other[key]) for key in heads)


def test_vectors_are_means_of_the_words_after_each_layer(
    source: Source, pocket_teacher: Path
) -> None:
    found = embeddings(source, TEXTS, 64, seed=1)
    model = AutoModel.from_pretrained(pocket_teacher, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(pocket_teacher)
    assert found.shape == (7, len(TEXTS), 256)
    for place, text in enumerate(TEXTS):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        for layer, state in enumerate(states.hidden_states):
            mean = state[0].mean(0)
            assert found[layer, place] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_an_untrained_model_has_the_shape_and_other_weights(source: Source) -> None:
    floor = Source(source.source, source.key, untrained=True)
    trained, random_, again = (embeddings(one, TEXTS, 64, seed=1) for one in (source, floor, floor))
    assert random_.shape == trained.shape
    assert not np.allclose(random_, trained, atol=0.1)
    assert np.array_equal(random_, again)
    assert floor.name == f"{source.name}, untrained"


def test_speed_is_measured_for_each_batch_and_length(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(speed, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(speed, "LENGTHS", (16, 32))
    monkeypatch.setattr(speed, "BATCHES", (1, 2))
    found = speed.measure(source)
    cells = [(one["batch"], one["length"]) for one in found["forward"]]
    assert cells == [(1, 16), (1, 32), (2, 16), (2, 32)]
    assert all(0 < one["p50_ms"] <= one["p99_ms"] for one in found["forward"])
    assert found["disk_bytes"] > 18_000_000
    speed.plot({source.name: 0.5}, {source.name: found}, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    assert speed.table({source.name: found}).count("\n") == 2 + len(cells)
