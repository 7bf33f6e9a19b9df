"""What a model keeps of its teacher: scores over seeds, intervals, and the tables that show them.

A model's score on a task is the mean over seeds, of the cells that `cells.chosen` names. Retention
is that score as a share of the teacher's, and, above a floor, the share that it keeps of what the
teacher has above an encoder of the student's shape that was never trained: fine-tuning alone gives
any model something, which no distillation is to be credited with.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from pipeline.evaluation import metrics
from pipeline.evaluation.cells import Cell

RESAMPLES, BLOCK = 1000, 50
LEVEL = 0.95
Floats = npt.NDArray[np.float64]


def over_seeds(scores: Sequence[float]) -> dict[str, Any]:
    """Mean and median; of two or more the standard deviation and Student's interval of the mean."""
    found: dict[str, Any] = {
        "mean": statistics.fmean(scores),
        "median": statistics.median(scores),
    }
    if len(scores) > 1:
        deviation = statistics.stdev(scores)
        reach = float(student_t.ppf((1 + LEVEL) / 2, len(scores) - 1)) * deviation
        reach /= len(scores) ** 0.5
        found |= {"sd": deviation, "ci95": [found["mean"] - reach, found["mean"] + reach]}
    return found


def resampled(cells: Sequence[Cell]) -> Floats:
    """The mean score over cells on resamples of the examples, the same ones for every call.

    Examples are drawn with replacement within each part (Efron & Tibshirani 1993, ch. 16), by
    generators whose seeds are the parts' places: two models' values belong together one by one.

    Returns:
        [RESAMPLES].
    """
    task = cells[0].task
    means = []
    for cell in cells:
        of_parts = []
        for place, (part, records) in enumerate(cell.records().items()):
            generator = np.random.default_rng(place)
            score = metrics.of_resamples(task, part, records)
            blocks = [score(_draw(generator, len(records))) for _ in range(RESAMPLES // BLOCK)]
            of_parts.append(np.concatenate(blocks))
        means.append(np.mean(of_parts, axis=0))
    found: Floats = np.mean(means, axis=0)
    return found


def _draw(generator: np.random.Generator, n: int) -> Floats:
    """[BLOCK, n]: how often each of n examples is in each of some resamples of n."""
    drawn = generator.integers(n, size=(BLOCK, n)) + n * np.arange(BLOCK)[:, None]
    counts: Floats = np.bincount(drawn.ravel(), minlength=BLOCK * n).reshape(BLOCK, n).astype(float)
    return counts


def interval(values: Floats) -> list[float]:
    """The middle 95% of resampled values."""
    tail = 100 * (1 - LEVEL) / 2
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def compare(
    model: Sequence[Cell],
    teacher: Sequence[Cell],
    floor: Sequence[Cell] | None,
    results: Mapping[Cell, dict[str, Any]],
) -> dict[str, Any]:
    """A model beside its teacher on one task.

    Args:
        model: chosen cells of the model.
        teacher: of the teacher.
        floor: of the untrained model; None where there is none.
        results: of each cell.

    Returns:
        `difference` and `of_teacher` with their intervals over resampled examples; `above_floor`,
        None where the teacher's lead on the floor is within the interval of chance.
    """
    ours, theirs = (statistics.fmean(results[cell]["score"] for cell in cells)
                    for cells in (model, teacher))  # fmt: skip
    our_values, their_values = resampled(model), resampled(teacher)
    found: dict[str, Any] = {
        "difference": ours - theirs,
        "difference_ci95": interval(our_values - their_values),
        "of_teacher": ours / theirs if theirs > 0 else None,
    }
    if theirs > 0 and (their_values > 0).all():
        found["of_teacher_ci95"] = interval(our_values / their_values)
    if floor is not None:
        lowest = statistics.fmean(results[cell]["score"] for cell in floor)
        is_above = interval(their_values - resampled(floor))[0] > 0
        share = (ours - lowest) / (theirs - lowest) if is_above else None
        found |= {"floor": lowest, "above_floor": share}
    return found


def tables(results: Mapping[str, Any]) -> str:
    """The results as Markdown: tasks, then languages, then models."""
    models, teacher = results["models"], results["teacher"]
    blocks = []
    head = ["task", "metric", "model", "mean", "± sd", "median", "seeds"]
    if teacher:
        head += ["of teacher", "above the floor", "difference, 95%"]
    rows = []
    for task, facts in results["tasks"].items():
        for name in models:
            found = results["scores"][name][task]
            row = [task, facts["metrics"][0], name, _percent(found["mean"]),
                   _percent(found.get("sd")), _percent(found["median"]),
                   str(len(found["seeds"]))]  # fmt: skip
            if teacher:
                kept = found.get("retention", {})
                low, high = kept.get("difference_ci95", (None, None))
                row += [_percent(kept.get("of_teacher"), 1), _percent(kept.get("above_floor"), 1),
                        f"{_signed(kept['difference'])} [{_signed(low)}, {_signed(high)}]"
                        if kept else "–"]  # fmt: skip
            rows.append(row)
    if len(results["tasks"]) > 1:
        for name in models:
            found = results["mean"][name]
            row = ["mean", "", name, _percent(found["score"]), "–", "–", ""]
            rows.append([*row, _percent(found["of_teacher"], 1), "–", "–"] if teacher else row)
    blocks.append(markdown(head, rows))
    for task, facts in results["tasks"].items():
        if len(facts["parts"]) > 1:
            rows = [[part or "–", *(_percent(results["scores"][name][task]["parts"][part])
                                    for name in models)] for part in facts["parts"]]  # fmt: skip
            title = f"{task}, {facts['metrics'][0]}, on {facts['reported']} files"
            blocks.append(f"### {title}\n\n" + markdown(["language", *models], rows))
    rows = [
        [name, f"{size['parameters']:,}", f"{size['parameters'] - size['embeddings']:,}",
         f"{size['flops_per_token'] / 1e6:,.1f} M"] for name, size in models.items()
    ]  # fmt: skip
    head = ["model", "parameters", "without word embeddings", "FLOPs a token"]
    blocks.append(markdown(head, rows))
    return "\n\n".join(blocks) + "\n"


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are wide enough to be read as they stand."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
