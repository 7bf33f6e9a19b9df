"""From examples to inputs and back: windows, places in the text, the best passage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.evaluation.kinds import LONGEST_ANSWER, Kind, _best_span, _Window, kind_of
from pipeline.evaluation.layouts import Answer, Example
from pipeline.evaluation.tasks import TASKS

CONTEXT = " ".join(f"In {1000 + i} the town of N{i} had {i} mills." for i in range(120))
TAGS = ("O", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def tokenizer(pocket_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(pocket_teacher)


def perfect(example: Example, kind: Kind, pairs: list[tuple[Any, Any]]) -> list[list[Any]]:
    """Logits that say of each window what its training labels say."""
    found = []
    for row, _ in pairs:
        starts, ends = np.zeros((2, len(row["input_ids"])), np.float32)
        starts[row["start_positions"]] += 5
        ends[row["end_positions"]] += 5
        found.append([starts, ends])
    return found


@pytest.mark.parametrize("town", [0, 57, 119])
def test_an_answer_anywhere_in_a_long_text_is_found_again(tokenizer: Any, town: int) -> None:
    kind = kind_of(TASKS["squad_v2"], (), tokenizer, 192)
    text = f"N{town} had {town} mills"
    answer = Answer(text, CONTEXT.index(text))
    example = Example("1", ("Which town of all of them had so many mills?", CONTEXT), (answer,))
    pairs = kind.inputs([example], training=True)
    assert len(pairs) > 5
    assert all(len(row["input_ids"]) <= 192 for row, _ in pairs)
    learnt = [row for row, _ in pairs if row["start_positions"]]
    assert learnt
    for row in learnt:
        ids = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert tokenizer.decode(ids).strip() == text
    (record,) = kind.predictions([example], [w for _, w in pairs], perfect(example, kind, pairs))
    assert record["predicted"] == text
    # Some window holds no answer, whose null score is the lowest of all: 0 against 10 there.
    assert record["no_answer"] == -10


def test_no_window_learns_a_part_of_an_answer(tokenizer: Any) -> None:
    kind = kind_of(TASKS["squad"], (), tokenizer, 96)
    texts = [f"the town of N{town} had {town} mills" for town in range(0, 120, 3)]
    examples = [Example(text, ("Which?", CONTEXT), (Answer(text, CONTEXT.index(text)),))
                for text in texts]  # fmt: skip
    learnt = set()
    for row, window in kind.inputs(examples, training=True):
        if row["start_positions"]:
            ids = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
            assert tokenizer.decode(ids).strip() == texts[window.of]
            learnt.add(window.of)
    assert len(learnt) == len(texts)


def test_windows_leave_out_no_character_and_share_some(tokenizer: Any) -> None:
    kind = kind_of(TASKS["squad"], (), tokenizer, 96)
    example = Example("1", ("Where?", CONTEXT), (Answer("In", 0),))
    windows = [window for _, window in kind.inputs([example], training=False)]
    covered = {i for window in windows for left, right in window.places for i in range(left, right)}
    assert {i for i, c in enumerate(CONTEXT) if c != " "} <= covered
    for before, after in itertools.pairwise(windows):
        assert after.places[0][0] < before.places[-1][1]


def test_a_question_longer_than_the_input_is_cut(tokenizer: Any) -> None:
    kind = kind_of(TASKS["squad"], (), tokenizer, 64)
    example = Example("1", ("Why? " * 500, "Because."), (Answer("Because", 0),))
    ((row, _),) = kind.inputs([example], training=True)
    assert len(row["input_ids"]) <= 64
    assert row["start_positions"] > 0


def test_the_best_passage_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for number in (1, 5, 60):
        starts, ends = rng.normal(size=(2, number + 4))
        window = _Window(0, 3, [(i, i + 1) for i in range(number)])
        best = max(
            (starts[3 + i] + ends[3 + j], i, j + 1)
            for i in range(number) for j in range(i, min(number, i + LONGEST_ANSWER))
        )  # fmt: skip
        assert _best_span(window, starts, ends) == best
    assert _best_span(_Window(0, 3, []), starts, ends)[0] == -np.inf


def test_every_word_of_a_long_sentence_gets_the_tag_of_its_first_token(tokenizer: Any) -> None:
    kind = kind_of(TASKS["wikiann"], TAGS, tokenizer, 32)
    rng = np.random.default_rng(0)
    words = ("Constantinople", "\u200b", "is", "far", "Überlandleitungsmast")
    examples = [
        Example(str(n), tuple(rng.choice(words, n)), tuple(rng.choice(TAGS, n))) for n in (3, 90)
    ]
    pairs = kind.inputs(examples, training=True)
    assert len(pairs) > 3
    labelled = sum(label >= 0 for row, _ in pairs for label in row["labels"])
    logits = [[np.eye(3)[np.maximum(row["labels"], 0)]] for row, _ in pairs]
    records = list(kind.predictions(examples, [known for _, known in pairs], logits))
    whole = [len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 0
             for example in examples for word in example.texts]  # fmt: skip
    assert labelled == sum(whole)
    said = [tag for record in records for tag in record["predicted"]]
    gold = [tag for record in records for tag in record["gold"]]
    assert said == [tag if is_there else "O" for tag, is_there in zip(gold, whole, strict=True)]


def test_pairs_and_choices_are_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    pair = Example("1", ("Ja.", "Nein."), 1)
    ((row, _),) = kind_of(TASKS["rte"], ("a", "b"), tokenizer, 128).inputs([pair], training=True)
    assert row["input_ids"] == tokenizer("Ja.", "Nein.")["input_ids"]
    assert row["labels"] == 1
    asked = Example("1", ("Why?", "Because.", "So."), 0)
    ((row, _),) = kind_of(TASKS["xcopa"], ("0", "1"), tokenizer, 128).inputs([asked], training=True)
    assert row["input_ids"] == [
        tokenizer("Why?", text)["input_ids"] for text in ("Because.", "So.")
    ]
