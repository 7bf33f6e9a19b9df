"""Scores against the official scripts' outputs and scikit-learn, and resamples against both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.evaluation import answers, metrics
from pipeline.evaluation.tasks import BIO, TASKS, Task

# What evaluate-v2.0.py of SQuAD 2.0 gives with --na-prob-thresh 0 for these, times 100.
QUESTIONS = [  # right answers, prediction, no-answer score
    (["Paris"], "paris.", -1.0),
    (["The Beatles", "Beatles"], "beatles", 0.5),
    ([], "", 2.0),
    ([], "Rome", 0.25),
    ([], "Oslo", 3.0),
    (["a"], "", 1.0),
    (["1,000 men", "1000"], "about 1,000", -2.0),
    (["red green blue"], "the green red red", -0.5),
    (["x"], "y", -3.0),
]
OFFICIAL = {
    "exact": 44.44444444444444,
    "f1": 59.25925925925927,
    "best_exact": 55.55555555555556,
    "best_f1": 70.37037037037037,
}
# What mlqa_evaluation_v1.py gives: language, right answer, prediction, exact match, F1.
MLQA = [
    ("en", "The cat's hat!", "a cats hat", 1.0, 1.0),
    ("es", "La «casa» de los Pérez", "casa de Pérez", 1.0, 1.0),
    ("hi", "लाल किला, दिल्ली", "लाल किला", 0.0, 0.8),
    ("vi", "của những người", "người Việt", 0.0, 0.6666666666666666),
    ("de", "Der Baum — die Bäume", "baum bäume", 1.0, 1.0),
    ("ar", "في المدينة الكبيرة", "مدينة كبيرة", 0.0, 0.8),
    ("zh", "2015年在伦敦（英国）", "伦敦 2015年", 0.0, 0.7272727272727273),
]


def squad_records() -> list[dict[str, Any]]:
    return [{"gold": g, "predicted": p, "no_answer": n} for g, p, n in QUESTIONS]


def records(gold: Sequence[Any], predicted: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"gold": g, "predicted": p} for g, p in zip(gold, predicted, strict=True)]


def measuring(name: str, *names: str) -> Task:
    return dataclasses.replace(TASKS[name], metrics=names)


def test_squad_2_as_the_official_script_scores_it() -> None:
    found = metrics.score(TASKS["squad_v2"], "", squad_records())
    assert {name: 100 * value for name, value in found.items()} == pytest.approx(
        OFFICIAL, rel=1e-14
    )


@pytest.mark.parametrize(("language", "gold", "predicted", "exact", "f1"), MLQA)
def test_mlqa_as_the_official_script_scores_it(
    language: str, gold: str, predicted: str, exact: float, f1: float
) -> None:
    assert answers.score("mlqa", language, [gold], predicted) == (exact, f1)


def test_squad_1_takes_the_best_of_all_answers_and_knows_no_empty_one() -> None:
    assert answers.score("squad", "", ["Ulm", "the city of Ulm"], "City of Ulm!") == (1.0, 1.0)
    assert answers.score("squad", "", ["The"], "a") == (1.0, 0.0)  # as the script of 1.1 has it
    assert answers.score("squad2", "", ["The"], "a") == (1.0, 1.0)


def test_scores_are_the_libraries_own() -> None:
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(0, 2, (2, 200)).tolist()
    many, guessed = rng.integers(0, 4, (2, 200)).tolist()
    x, y = rng.integers(0, 9, (2, 200)).astype(float).tolist()
    found = metrics.score(measuring("mrpc", "accuracy", "f1"), "", records(gold, predicted))
    assert found == {"accuracy": accuracy_score(gold, predicted), "f1": f1_score(gold, predicted)}
    found = metrics.score(measuring("xnli", "matthews", "f1_macro"), "", records(many, guessed))
    assert found == {
        "matthews": matthews_corrcoef(many, guessed),
        "f1_macro": f1_score(many, guessed, average="macro"),
    }
    found = metrics.score(TASKS["stsb"], "", records(x, y))
    assert found == {"spearman": spearmanr(x, y).statistic, "pearson": pearsonr(x, y).statistic}
    assert metrics.score(TASKS["stsb"], "", records(x, [1.0] * 200))["pearson"] == 0


def sentences(rng: np.random.Generator, number: int) -> list[list[str]]:
    return [rng.choice(BIO, size=rng.integers(1, 9)).tolist() for _ in range(number)]


def test_tags_are_scored_by_entity_and_by_word() -> None:
    rng = np.random.default_rng(1)
    gold = sentences(rng, 50)
    predicted = [[tag if rng.random() < 0.7 else "O" for tag in tags] for tags in gold]
    words = [sum(each, []) for each in (gold, predicted)]  # noqa: RUF017
    assert metrics.score(TASKS["wikiann"], "en", records(gold, predicted)) == {
        "f1": entity_f1(gold, predicted),
        "accuracy": accuracy_score(*words),
    }


def cases() -> dict[str, tuple[Task, list[dict[str, Any]]]]:
    rng = np.random.default_rng(2)
    gold, predicted = rng.integers(0, 3, (2, 40)).tolist()
    x, y = rng.integers(0, 9, (2, 40)).astype(float).tolist()
    tags = sentences(rng, 40)
    guessed = [[tag if rng.random() < 0.7 else "O" for tag in each] for each in tags]
    two = [g % 2 for g in gold], [p % 2 for p in predicted]
    return {
        "accuracy": (measuring("xnli", "accuracy"), records(gold, predicted)),
        "matthews": (measuring("xnli", "matthews"), records(gold, predicted)),
        "f1_macro": (measuring("xnli", "f1_macro"), records(gold, predicted)),
        "f1": (measuring("mrpc", "f1"), records(*two)),
        "pearson": (measuring("stsb", "pearson"), records(x, y)),
        "spearman": (measuring("stsb", "spearman"), records(x, y)),
        "entities": (measuring("wikiann", "f1"), records(tags, guessed)),
        "words": (measuring("udpos", "accuracy"), records(tags, guessed)),
        "answers": (measuring("mlqa", "f1"), [
            {"gold": [gold], "predicted": predicted} for _, gold, predicted, *_ in MLQA
        ]),
        "thresholded": (measuring("squad_v2", "f1"), squad_records()),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_a_resample_scores_as_its_examples_do(name: str) -> None:
    task, rows = cases()[name]
    rng = np.random.default_rng(3)
    drawn = rng.integers(len(rows), size=(20, len(rows)))
    counts = np.array([np.bincount(places, minlength=len(rows)) for places in drawn], float)
    found = metrics.of_resamples(task, "de", rows)(counts)
    expected = [metrics.score(task, "de", [rows[i] for i in places])[task.metric]
                for places in drawn]  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(found)) > 5


def test_the_best_threshold_is_kept_for_resamples() -> None:
    task = TASKS["squad_v2"]
    whole = metrics.of_resamples(task, "", squad_records())(np.ones((1, len(QUESTIONS))))
    assert whole == pytest.approx([OFFICIAL["best_f1"] / 100])
