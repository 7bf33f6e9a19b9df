"""The kinds of tasks: how examples become a model's inputs, and its logits become predictions.

An input is a dictionary of a model's arguments, lists of numbers for one sequence (of several, for
`choice`), with the labels of training in it. What a kind needs to read the logits stays beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError
from pipeline.evaluation.layouts import Example
from pipeline.evaluation.tasks import Task

Input = dict[str, Any]
Logits = Sequence[npt.NDArray[np.float32]]
Record = dict[str, Any]
IGNORED = -100  # label of a token that no loss sees
STRIDE = 128  # tokens that two windows of a context share (Devlin et al. 2019)
LONGEST_QUESTION = 64
LONGEST_ANSWER = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """One kind of task on one tokenizer.

    Args:
        task: says what is measured.
        labels: classes or tags by number.
        tokenizer: a fast one.
        max_length: tokens of an input at most.
    """

    task: Task
    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int
    head: ClassVar[str]  # the transformers class that has it

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return len(self.labels)

    def inputs(self, examples: Sequence[Example], training: bool) -> list[tuple[Input, Any]]:
        """Inputs, several for a long example, each with what `predictions` has to know of it."""
        raise NotImplementedError

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """One record an example, in order, from what belongs to all of its inputs."""
        raise NotImplementedError

    def _encoded(self, *texts: Sequence[str]) -> list[Input]:
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


class Classification(Kind):
    """A class of a text or a pair."""

    head = "AutoModelForSequenceClassification"

    def inputs(self, examples: Sequence[Example], training: bool) -> list[tuple[Input, Any]]:
        """See Kind."""
        columns = zip(*(example.texts for example in examples), strict=True)
        encoded = self._encoded(*map(list, columns))
        for row, example in zip(encoded, examples, strict=True):
            row["labels"] = example.label
        return [(row, None) for row in encoded]

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """See Kind."""
        for example, (row,) in zip(examples, logits, strict=True):
            yield {"gold": example.label, "predicted": int(row.argmax())}


class Regression(Classification):
    """A number for a text or a pair."""

    @property
    def num_labels(self) -> int:
        """Outputs of the head; of one, transformers makes a regression with the squared error."""
        return 1

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """See Kind."""
        for example, (row,) in zip(examples, logits, strict=True):
            yield {"gold": example.label, "predicted": float(row[0])}


class Choice(Kind):
    """One of several answers."""

    head = "AutoModelForMultipleChoice"

    def inputs(self, examples: Sequence[Example], training: bool) -> list[tuple[Input, Any]]:
        """See Kind; here an argument has a list for each answer."""
        found: list[tuple[Input, Any]] = []
        for example in examples:
            asked, *choices = example.texts
            encoded = self._encoded([asked] * len(choices), choices)
            whole: Input = {name: [row[name] for row in encoded] for name in encoded[0]}
            found.append(({**whole, "labels": example.label}, None))
        return found

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """See Kind."""
        for example, (row,) in zip(examples, logits, strict=True):
            yield {"gold": example.label, "predicted": int(row.argmax())}


class Tagging(Kind):
    """A tag for each word, read at its first token; long sentences are cut into windows."""

    head = "AutoModelForTokenClassification"

    def inputs(self, examples: Sequence[Example], training: bool) -> list[tuple[Input, Any]]:
        """See Kind; known is the words' places in the input, as (word, token)."""
        encoded = self.tokenizer(
            [list(example.texts) for example in examples],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
        )
        number = {label: i for i, label in enumerate(self.labels)}
        found: list[tuple[Input, Any]] = []
        seen: set[tuple[int, int]] = set()
        for window, of in enumerate(encoded["overflow_to_sample_mapping"]):
            ids = encoded.word_ids(window)
            firsts = []
            for token, word in enumerate(ids):
                if word is not None and (of, word) not in seen:
                    seen.add((of, word))
                    firsts.append((word, token))
            labels = [IGNORED] * len(ids)
            for word, token in firsts:
                labels[token] = number[examples[of].label[word]]
            row = {name: encoded[name][window] for name in self.tokenizer.model_input_names
                   if name in encoded}  # fmt: skip
            found.append(({**row, "labels": labels}, (of, firsts)))
        return found

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """See Kind; a word that the tokenizer leaves nothing of is no entity."""
        outside = "O" if "O" in self.labels else self.labels[0]
        tags = [[outside] * len(example.texts) for example in examples]
        for (of, firsts), (row,) in zip(known, logits, strict=True):
            for word, token in firsts:
                tags[of][word] = self.labels[int(row[token].argmax())]
        for example, predicted in zip(examples, tags, strict=True):
            yield {"gold": list(example.label), "predicted": predicted}


@dataclasses.dataclass(frozen=True)
class _Window:
    """A part of a context: whose it is, where its tokens lie in the text, and in the input."""

    of: int
    first: int  # token of the input
    places: list[tuple[int, int]]  # of each token from there on: characters of the context


class Span(Kind):
    """A passage of a context, or that there is none."""

    head = "AutoModelForQuestionAnswering"

    @property
    def num_labels(self) -> int:
        """Outputs of the head: of a start, and of an end."""
        return 2

    def inputs(self, examples: Sequence[Example], training: bool) -> list[tuple[Input, Any]]:
        """See Kind; known is a _Window. An answer that is not all in a window is none there."""
        questions = [self._cut(example.texts[0].lstrip()) for example in examples]
        encoded = self.tokenizer(
            questions,
            [example.texts[1] for example in examples],
            truncation="only_second",
            max_length=self.max_length,
            stride=min(STRIDE, (self.max_length - LONGEST_QUESTION) // 3),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found: list[tuple[Input, Any]] = []
        for row, of in enumerate(encoded["overflow_to_sample_mapping"]):
            sides = encoded.sequence_ids(row)
            first = sides.index(1) if 1 in sides else len(sides)
            places = [place for place, side in zip(encoded["offset_mapping"][row], sides,
                                                   strict=True) if side == 1]  # fmt: skip
            window = _Window(of, first, places)
            whole: Input = {name: encoded[name][row] for name in self.tokenizer.model_input_names
                            if name in encoded}  # fmt: skip
            start, end = self._labels(examples[of], window)
            found.append(({**whole, "start_positions": start, "end_positions": end}, window))
        return found

    def _cut(self, question: str) -> str:
        places = self.tokenizer(
            question, add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]  # fmt: skip
        longest = min(LONGEST_QUESTION, self.max_length // 2)
        return question[: places[longest - 1][1]] if len(places) > longest else question

    def _labels(self, example: Example, window: _Window) -> tuple[int, int]:
        """The answer's first and last token, or the token that begins the input, twice."""
        if not example.label:
            return 0, 0
        answer = example.label[0]
        start, end = answer.start, answer.start + len(answer.text)
        inside = [i for i, (left, right) in enumerate(window.places)
                  if left < end and right > start]  # fmt: skip
        if not inside or window.places[0][0] > start or window.places[-1][1] < end:
            return 0, 0
        return window.first + inside[0], window.first + inside[-1]

    def predictions(
        self, examples: Sequence[Example], known: Sequence[Any], logits: Sequence[Logits]
    ) -> Iterator[Record]:
        """See Kind: the best passage of all windows, and how much better no answer would be."""
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
        nothing = [np.inf] * len(examples)
        for window, (starts, ends) in zip(known, logits, strict=True):
            score, left, right = _best_span(window, starts, ends)
            nothing[window.of] = min(nothing[window.of], float(starts[0]) + float(ends[0]))
            if score > best[window.of][0]:
                context = examples[window.of].texts[1]
                best[window.of] = score, context[left:right].strip()
        for example, (score, text), none in zip(examples, best, nothing, strict=True):
            yield {
                "gold": [answer.text for answer in example.label],
                "predicted": text,
                "no_answer": none - score if text else 0.0,
            }


def _best_span(
    window: _Window, starts: npt.NDArray[Any], ends: npt.NDArray[Any]
) -> tuple[float, int, int]:
    """The best score of a start and an end behind it, and the characters between them."""
    number = len(window.places)
    if number == 0:
        return -np.inf, 0, 0
    scores = starts[window.first :][:number, None] + ends[window.first :][None, :number]
    scores = np.where(np.triu(np.ones_like(scores)) - np.triu(np.ones_like(scores), LONGEST_ANSWER),
                      scores, -np.inf)  # fmt: skip
    start, end = divmod(int(scores.argmax()), number)
    return float(scores[start, end]), window.places[start][0], window.places[end][1]


KINDS: dict[str, type[Kind]] = {
    "classification": Classification,
    "regression": Regression,
    "choice": Choice,
    "span": Span,
    "tagging": Tagging,
}


def kind_of(task: Task, labels: tuple[str, ...], tokenizer: Any, max_length: int) -> Kind:
    """The task's kind on a tokenizer.

    Raises:
        ConfigError: the tokenizer does not say where its tokens lie in the text.
    """
    if task.kind in ("span", "tagging") and not tokenizer.is_fast:
        raise ConfigError(
            f"{task.name} needs the places of tokens in the text, which a slow tokenizer does not "
            "give; save the model with its tokenizer.json"
        )
    return KINDS[task.kind](task, labels, tokenizer, max_length)
