"""Which hyper-parameters are chosen, what is kept of a teacher, and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from pipeline.evaluation.cells import chosen
from pipeline.evaluation.fine_tuning import Source, size_of
from pipeline.evaluation.retention import compare, interval, over_seeds, resampled
from pipeline.evaluation.speed import flops_per_token
from pipeline.evaluation.tasks import TASKS

Parts = dict[str, list[dict[str, Any]]]


def cell(
    *, seed: int = 1, rate: float = 1e-5, epochs: float = 3, parts: Parts | None = None
) -> Any:
    training = SimpleNamespace(seed=seed, learning_rate=rate, epochs=epochs)
    return SimpleNamespace(training=training, task=TASKS["xnli"], records=lambda: parts)


def test_the_best_median_on_the_dev_set_is_chosen_whatever_is_reported() -> None:
    dev = {1e-5: (0.5, 0.6, 0.61), 2e-5: (0.1, 0.62, 0.63), 3e-5: (0.9, 0.5, 0.5)}
    cells = [cell(seed=seed, rate=rate) for rate in dev for seed in range(3)]
    results = {
        id(c): {"dev": dev[c.training.learning_rate][c.training.seed],
                "score": 1 - dev[c.training.learning_rate][c.training.seed]} for c in cells
    }  # fmt: skip

    class ById(dict[Any, Any]):
        def __getitem__(self, key: Any) -> Any:
            return results[id(key)]

    found = chosen(cells, ById())
    assert [(c.training.learning_rate, c.training.seed) for c in found] == [
        (2e-5, 0), (2e-5, 1), (2e-5, 2)
    ]  # fmt: skip


def test_seeds_are_summed_up_as_scipy_does() -> None:
    scores = [0.71, 0.69, 0.74, 0.7]
    found = over_seeds(scores)
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert found["ci95"] == pytest.approx([expected.low, expected.high])
    assert (found["mean"], found["median"]) == (statistics.fmean(scores), 0.705)
    assert found["sd"] == pytest.approx(np.std(scores, ddof=1))
    assert over_seeds([0.5]) == {"mean": 0.5, "median": 0.5}


def records(gold: Sequence[int], right: Sequence[bool]) -> list[dict[str, Any]]:
    return [{"gold": g, "predicted": g if ok else 1 - g}
            for g, ok in zip(gold, right, strict=True)]  # fmt: skip


def models(seed: int, *accuracies: float) -> list[list[Any]]:
    """Of each accuracy two cells of two languages; models err on the same examples mostly."""
    rng = np.random.default_rng(seed)
    gold, hardness = rng.integers(0, 2, (2, 400)).tolist(), rng.random((2, 400))
    found: list[list[Any]] = []
    for accuracy in accuracies:
        group = []
        for seed_ in (1, 2):
            noisy = hardness + rng.normal(scale=0.05, size=hardness.shape)
            parts = {part: records(gold[i], noisy[i] < accuracy)
                     for i, part in enumerate(("de", "en"))}  # fmt: skip
            group.append(cell(seed=seed_, parts=parts))
        found.append(group)
    return found


def score(one: Any) -> float:
    return statistics.fmean(
        accuracy_score([r["gold"] for r in rows], [r["predicted"] for r in rows])
        for rows in one.records().values()
    )


class Results(dict[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return {"score": score(key)}


def test_retention_is_of_the_teacher_and_of_what_it_has_above_the_floor() -> None:
    student, teacher, floor = models(0, 0.8, 0.9, 0.5)
    found = compare(student, teacher, floor, Results())
    ours, theirs, lowest = (statistics.fmean(map(score, group))
                            for group in (student, teacher, floor))  # fmt: skip
    assert found["difference"] == ours - theirs
    assert found["of_teacher"] == ours / theirs
    assert found["above_floor"] == (ours - lowest) / (theirs - lowest)
    assert found["difference_ci95"][0] < ours - theirs < found["difference_ci95"][1] < 0
    assert found == compare(student, teacher, floor, Results())  # no chance in it
    weak = models(0, 0.8, 0.501, 0.5)
    assert compare(*weak, Results())["above_floor"] is None
    assert "above_floor" not in compare(student, teacher, None, Results())


def test_the_interval_of_a_paired_difference_is_narrower_and_right() -> None:
    """Against the standard error of the mean difference, by its formula."""
    student, teacher = models(1, 0.8, 0.9)
    ours, theirs = resampled(student), resampled(teacher)
    low, high = interval(ours - theirs)

    def right(group: list[Any], part: str) -> Any:
        return np.mean([[r["gold"] == r["predicted"] for r in one.records()[part]]
                        for one in group], axis=0)  # fmt: skip

    differences = [right(student, part) - right(teacher, part) for part in ("de", "en")]
    expected = np.sqrt(sum(d.var() / len(d) for d in differences)) / 2
    assert (ours - theirs).std() == pytest.approx(expected, rel=0.1)
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.1)
    assert (ours - theirs).std() < 0.7 * np.hypot(ours.std(), theirs.std())


def test_sizes_and_operations_are_those_of_the_formula(pocket_teacher: Path) -> None:
    source = Source(str(pocket_teacher), "--model")
    layers, width, inner, length = 6, 256, 1024, 128
    products = layers * (4 * width**2 + 2 * width * inner)
    pooler = width**2 / length  # of one token an input
    assert flops_per_token(source) == 2 * (products + pooler + layers * 2 * length * width)
    size = size_of(source)
    assert size["embeddings"] == 16000 * 256
    assert size["parameters"] == 9032704
