"""Scores from predictions, by the libraries; and the same scores of many resamples at once.

A record is what one example's prediction is kept as: `id`, `gold`, `predicted`, and for answers
`no_answer`, the score of there being none. Scores are from 0 to 1 (correlations from -1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.evaluation import answers
from pipeline.evaluation.tasks import Task

Floats = npt.NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
NO_ANSWER_THRESHOLD = 0.0  # the fixed one: an answer is given if it scores above there being none


def score(task: Task, part: str, records: Records) -> dict[str, float]:
    """Everything that a task measures, of one part.

    Args:
        task: says what is measured.
        part: the language, for answers.
        records: predictions.
    """
    if task.kind == "span":
        scored = _of_answers(task, part, records)
        found = {name: float(np.mean(values)) for name, values in scored.items()}
        return {name: found[name] for name in task.measured}
    gold = [record["gold"] for record in records]
    predicted = [record["predicted"] for record in records]
    return {name: _score(task, name, gold, predicted) for name in task.measured}


def _score(task: Task, name: str, gold: list[Any], predicted: list[Any]) -> float:
    if task.kind == "tagging":
        if name == "f1":
            return float(entity_f1(gold, predicted, zero_division=0))
        return float(accuracy_score([*chain(*gold)], [*chain(*predicted)]))
    if name == "accuracy":
        return float(accuracy_score(gold, predicted))
    if name == "f1":
        return float(f1_score(gold, predicted, zero_division=0))
    if name == "f1_macro":
        return float(f1_score(gold, predicted, average="macro", zero_division=0))
    if name == "matthews":
        return float(matthews_corrcoef(gold, predicted))
    correlation = {"pearson": pearsonr, "spearman": spearmanr}[name]
    if len(set(predicted)) == 1 or len(set(gold)) == 1:
        return 0.0  # of a constant there is no correlation
    return float(correlation(gold, predicted).statistic)


def _of_answers(task: Task, part: str, records: Records) -> dict[str, list[float]]:
    """Each answer's scores by each measure."""
    scored = [
        answers.score(task.scorer, part, record["gold"], record["predicted"]) for record in records
    ]
    found: dict[str, list[float]] = {}
    for name in ("exact", "f1"):
        raw = [getattr(one, name) for one in scored]
        if task.scorer == "squad2":
            found[f"best_{name}"] = answers.at_best_threshold(records, raw)
            raw = answers.at_fixed_threshold(records, raw, NO_ANSWER_THRESHOLD)
        found[name] = raw
    return found


def of_resamples(task: Task, part: str, records: Records) -> Callable[[Floats], Floats]:
    """The metric that models are compared by, of many resamples of the same examples at once.

    SQuAD 2.0's threshold stays that of all examples.

    Args:
        task: says which metric.
        part: the language, for answers.
        records: predictions, n.

    Returns:
        A function of counts [resamples, n], how often each example is in each resample, that gives
        the scores [resamples].
    """
    if task.kind == "span":
        return partial(_mean, values=np.array(_of_answers(task, part, records)[task.metric]))
    gold = [record["gold"] for record in records]
    predicted = [record["predicted"] for record in records]
    if task.kind == "tagging":
        return _tagging(task.metric, gold, predicted)
    if task.kind == "regression":
        pair = np.array(gold, float), np.array(predicted, float)
        return partial(_correlation, pair=pair, ranked=task.metric == "spearman")
    if task.metric == "accuracy":
        right = [a == b for a, b in zip(gold, predicted, strict=True)]
        return partial(_mean, values=np.array(right, float))
    return partial(_of_confusion, metric=task.metric, pairs=_pairs(gold, predicted))


def _mean(counts: Floats, values: Floats) -> Floats:
    found: Floats = counts @ values / counts.sum(1)
    return found


def _tagging(
    metric: str, gold: list[list[str]], predicted: list[list[str]]
) -> Callable[[Floats], Floats]:
    """Both metrics of tags are sums over sentences, one over the other."""
    if metric == "accuracy":
        above = [sum(a == b for a, b in zip(*pair, strict=True))
                 for pair in zip(gold, predicted, strict=True)]  # fmt: skip
        below = [len(tags) for tags in gold]
    else:
        entities = [(set(get_entities(a)), set(get_entities(b)))
                    for a, b in zip(gold, predicted, strict=True)]  # fmt: skip
        above = [2 * len(a & b) for a, b in entities]
        below = [len(a) + len(b) for a, b in entities]
    sums = np.array([above, below], float).T
    return partial(_ratio, sums=sums)


def _ratio(counts: Floats, sums: Floats) -> Floats:
    above, below = (counts @ sums).T
    return _quotient(above, below)


def _quotient(above: Floats, below: Floats) -> Floats:
    """0 where there is nothing to divide by."""
    found: Floats = above / np.where(below == 0, 1, below)
    return found


def _pairs(gold: list[int], predicted: list[int]) -> Floats:
    """[n, classes, classes]: one where an example's class was called what it was called."""
    classes = 1 + max(1, *gold, *predicted)
    found = np.zeros((len(gold), classes, classes))
    found[np.arange(len(gold)), gold, predicted] = 1
    return found


def _of_confusion(counts: Floats, metric: str, pairs: Floats) -> Floats:
    table: Floats = np.tensordot(counts, pairs, axes=1)
    right = np.trace(table, axis1=1, axis2=2)
    of_gold, of_predicted, all_ = table.sum(2), table.sum(1), table.sum((1, 2))
    if metric == "matthews":  # Gorodkin 2004, for any number of classes
        above = right * all_ - (of_gold * of_predicted).sum(1)
        spread = [all_**2 - (marginal**2).sum(1) for marginal in (of_gold, of_predicted)]
        return _quotient(above, np.sqrt(spread[0] * spread[1]))
    both = np.diagonal(table, axis1=1, axis2=2)
    sums = of_gold + of_predicted
    each = _quotient(2 * both, sums)
    if metric == "f1":
        return each[:, 1]
    found: Floats = each.sum(1) / np.maximum((sums > 0).sum(1), 1)
    return found


def _ranks(counts: Floats, values: Floats) -> Floats:
    """[resamples, n]: each example's rank in each resample, ties sharing the mean of theirs."""
    _, place = np.unique(values, return_inverse=True)
    repeated = np.zeros((len(counts), place.max() + 1))
    np.add.at(repeated.T, place, counts.T)
    upto = repeated.cumsum(1)
    found: Floats = (upto - (repeated - 1) / 2)[:, place]
    return found


def _correlation(counts: Floats, pair: tuple[Floats, Floats], ranked: bool) -> Floats:
    """[resamples]: Pearson's of the two, or of their ranks, which is Spearman's."""
    total = counts.sum(1, keepdims=True)
    centred = []
    for values in pair:
        values = _ranks(counts, values) if ranked else values[None]
        centred.append(values - (counts * values).sum(1, keepdims=True) / total)
    x, y = centred
    above = (counts * x * y).sum(1)
    below = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
    return _quotient(above, below)
