"""Answers to questions, scored as the official scripts of SQuAD 1.1, SQuAD 2.0 and MLQA do."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "ar": r"\sال^|ال",  # as the official script has it: the article wherever it stands
}
_ASCII_PUNCTUATION = frozenset(string.punctuation)
_HAN = re.compile(r"[\u4e00-\u9fa5]")


@cache
def _all_punctuation() -> frozenset[str]:
    letters = (chr(i) for i in range(sys.maxunicode))
    return _ASCII_PUNCTUATION.union(c for c in letters if unicodedata.category(c)[0] == "P")


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra white space (SQuAD)."""
    kept = "".join(c for c in text.lower() if c not in _ASCII_PUNCTUATION)
    return " ".join(re.sub(_ARTICLES["en"], " ", kept).split())


def normalised_in(language: str, text: str) -> str:
    """As MLQA does: all punctuation, the language's articles, and Chinese a character a word.

    Args:
        language: ar, de, en, es, hi, vi or zh.
        text: an answer.
    """
    kept = "".join(c for c in text.lower() if c not in _all_punctuation())
    if language in _ARTICLES:
        kept = re.sub(_ARTICLES[language], " ", kept)
    if language == "zh":
        kept = _HAN.sub(r" \g<0> ", kept)
    return " ".join(kept.split())


def exact(normalise: Callable[[str], str], gold: str, predicted: str) -> float:
    """1 if the two are the same after normalisation, else 0."""
    return float(normalise(gold) == normalise(predicted))


def f1(normalise: Callable[[str], str], gold: str, predicted: str) -> float:
    """The harmonic mean of the words' precision and recall; of no words, whether both have none."""
    ours, theirs = normalise(predicted).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


class Scores(NamedTuple):
    """One answer's scores."""

    exact: float
    f1: float


def score(scorer: str, part: str, golds: Sequence[str], predicted: str) -> Scores:
    """The best over all right answers.

    Args:
        scorer: squad, squad2 or mlqa.
        part: the language, for mlqa.
        golds: right answers; none for a question without one, in squad2.
        predicted: the answer; "" is that there is none.
    """
    normalise = partial(normalised_in, part) if scorer == "mlqa" else normalised
    if scorer == "squad2":  # there an answer of nothing but articles is none
        golds = [gold for gold in golds if normalise(gold)] or [""]
    elif not normalise(predicted):  # ... and here no word is right or wrong
        return Scores(max(exact(normalise, gold, predicted) for gold in golds), 0.0)
    return Scores(
        max(exact(normalise, gold, predicted) for gold in golds),
        max(f1(normalise, gold, predicted) for gold in golds),
    )


def at_fixed_threshold(
    records: Sequence[Mapping[str, Any]], scores: Sequence[float], threshold: float
) -> list[float]:
    """Scores where questions whose no-answer score is above a threshold get no answer.

    Args:
        records: of questions, with `gold`, `predicted` and `no_answer`.
        scores: of the answers that were predicted, if all are given.
        threshold: above which none is given.
    """
    return [
        float(not record["gold"]) if record["no_answer"] > threshold else score
        for record, score in zip(records, scores, strict=True)
    ]


def at_best_threshold(records: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> list[float]:
    """Scores at the threshold that makes their sum largest, as SQuAD 2.0's script counts them.

    It takes any answer to a question that has none for wrong, even one of articles alone.

    Args:
        records: see `at_fixed_threshold`.
        scores: see there.
    """
    order = sorted(range(len(records)), key=lambda i: float(records[i]["no_answer"]))
    answered = [
        score if record["gold"] else float(not record["predicted"])
        for record, score in zip(records, scores, strict=True)
    ]
    unanswered = [float(not record["gold"]) for record in records]
    current, best, number = 0.0, 0.0, 0
    for place, i in enumerate(order):
        current += answered[i] - unanswered[i]
        if current > best:
            best, number = current, place + 1
    for i in order[:number]:
        unanswered[i] = answered[i]
    return unanswered
