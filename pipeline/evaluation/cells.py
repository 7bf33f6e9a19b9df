"""The unit of work: one model fine-tuned on one task with one set of hyper-parameters and one seed.

Each cell is a folder of its own with its result, written last, so that a killed evaluation goes on
with the cells that are missing. Several processes share them out by locks, which the kernel lifts
when their holder dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.command import RunError
from data_prep.durable import write_durably
from pipeline.evaluation import metrics
from pipeline.evaluation.data import TaskData
from pipeline.evaluation.fine_tuning import (
    BATCH_SIZE,
    WARMUP,
    WEIGHT_DECAY,
    Source,
    Training,
    embeddings,
    fine_tune,
    logits_of,
)
from pipeline.evaluation.kinds import Kind, Record, kind_of
from pipeline.evaluation.layouts import Example
from pipeline.evaluation.tasks import Task

RESULT, TIMES = "result.json", "times.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "scikit-learn", "scipy", "seqeval")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """What is run, and where its result goes.

    Args:
        source: the model.
        name: of the model, as tables call it.
        digest: of the model.
        task: that it is fine-tuned on.
        data: of the task.
        training: hyper-parameters and seed.
        root: folder of all cells.
    """

    source: Source
    name: str
    digest: str
    task: Task
    data: TaskData
    training: Training
    root: Path

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the result follows from."""
        import torch

        return {
            "model": self.digest,
            "untrained": self.source.untrained,
            "task": self.task.name,
            "kind": self.task.kind,
            "metrics": list(self.task.measured),
            "scorer": self.task.scorer,
            "max_length": self.source.max_length(self.task.max_length),
            "data": self.data.digest,
            "reported": self.data.reported,
            "training": dataclasses.asdict(self.training),
            "batch_size": BATCH_SIZE,
            "warmup": WARMUP,
            "weight_decay": WEIGHT_DECAY,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }

    @property
    def folder(self) -> Path:
        """Where its result goes: named for people, and by a digest of all facts."""
        facts = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^\w.-]+", "-", self.name).strip("-")
        return self.root / slug / self.task.name / f"{self.label}-{facts[:10]}"

    @property
    def label(self) -> str:
        """Its hyper-parameters."""
        if self.task.kind == "retrieval":
            return f"seed{self.training.seed}"
        return (
            f"lr{self.training.learning_rate:g}-epochs{self.training.epochs:g}"
            f"-seed{self.training.seed}"
        )

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    def result(self) -> dict[str, Any]:
        """What `run` found."""
        found: dict[str, Any] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        return found

    def times(self) -> dict[str, float]:
        """How long it took, in seconds."""
        found: dict[str, float] = json.loads((self.folder / TIMES).read_text(encoding="utf-8"))
        return found

    def records(self) -> dict[str, list[Record]]:
        """The predictions that are reported, by part."""
        return {part: [json.loads(line) for line in self._predictions(part).open(encoding="utf-8")]
                for part in self.data.test}  # fmt: skip

    def _predictions(self, part: str) -> Path:
        return self.folder / f"predictions{part and '-'}{part}.jsonl"

    def run(self) -> None:
        """Fine-tune, predict, score, and write it all."""
        started = time.monotonic()
        if self.task.kind == "retrieval":
            found, extra = self._retrieve()
            trained = started
        else:
            kind = _kind(self.source, self.task, self.data.labels)
            inputs = _inputs(kind, _Identity(self.data.train))
            model = fine_tune(self.source, kind, [row for row, _ in inputs], self.training)
            trained = time.monotonic()
            found, extra = {}, {}
            for split, parts in (("dev", self.data.dev), (self.data.reported, self.data.test)):
                for part, examples in parts.items():
                    if (split, part) not in found:
                        found[split, part] = self._predict(model, kind, examples)
        scores = {key: metrics.score(self.task, key[1], rows) for key, rows in found.items()}
        reported = {part: scores[self.data.reported, part] for part in self.data.test}
        dev = {part: scores["dev", part] for part in self.data.dev} or reported
        for part in reported:
            lines = (json.dumps(row, ensure_ascii=False) for row in found[self.data.reported, part])
            write_durably(self._predictions(part), "".join(f"{line}\n" for line in lines))
        times = {"train": trained - started, "predict": time.monotonic() - trained}
        write_durably(self.folder / TIMES, json.dumps(times))
        result = {
            "dev": statistics.fmean(part[self.task.metric] for part in dev.values()),
            "score": statistics.fmean(part[self.task.metric] for part in reported.values()),
            "parts": reported,
            **extra,
            "facts": self.facts,
        }
        write_durably(self.folder / RESULT, json.dumps(result, indent=1))

    def _predict(self, model: Any, kind: Kind, examples: Sequence[Example]) -> list[Record]:
        inputs = kind.inputs(examples, training=False)
        logits = logits_of(
            model, kind.tokenizer, [row for row, _ in inputs], bf16=self.training.bf16
        )
        records = kind.predictions(examples, [known for _, known in inputs], logits)
        return [{"id": e.id, **record} for e, record in zip(examples, records, strict=True)]

    def _retrieve(self) -> tuple[dict[tuple[str, str], list[Record]], dict[str, Any]]:
        """Each sentence's nearest translation, by the layer whose mean score is best."""
        length = self.source.max_length(self.task.max_length)
        found: list[dict[tuple[str, str], list[Record]]] = []
        for part, examples in self.data.test.items():
            sides = zip(*(example.texts for example in examples), strict=True)
            vectors = [embeddings(self.source, side, length, self.training.seed) for side in sides]
            for layer, (ours, theirs) in enumerate(zip(*vectors, strict=True)):
                nearest = np.concatenate(
                    [
                        (block @ theirs.T).argmax(1)
                        for block in np.array_split(ours, -(-len(ours) // 1000))
                    ]
                )
                rows = [
                    {"id": e.id, "gold": e.texts[1], "predicted": examples[place].texts[1]}
                    for e, place in zip(examples, nearest, strict=True)
                ]
                found += [{}] if layer == len(found) else []
                found[layer][self.data.reported, part] = rows
        accuracies = [
            statistics.fmean(metrics.score(self.task, key[1], rows)[self.task.metric]
                             for key, rows in of_layer.items()) for of_layer in found
        ]  # fmt: skip
        best = int(np.argmax(accuracies))
        return found[best], {"layer": best, "layers": accuracies}


class _Identity:
    """Examples as a key of a cache, by identity: hashing them all costs more than it saves."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __hash__(self) -> int:
        return id(self.examples)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.examples is self.examples


@functools.lru_cache(maxsize=1)
def _kind(source: Source, task: Task, labels: tuple[str, ...]) -> Kind:
    return kind_of(task, labels, source.tokenizer(), source.max_length(task.max_length))


@functools.lru_cache(maxsize=1)
def _inputs(kind: Kind, examples: _Identity) -> list[tuple[dict[str, Any], Any]]:
    return kind.inputs(examples.examples, training=True)


def run_cells(cells: Sequence[Cell], first: int, say: Callable[[str], object]) -> list[Cell]:
    """Run the cells that have no result and that no other process is at.

    Args:
        cells: all of them; every process names the same.
        first: the place to begin at, so that processes meet late.
        say: gets a line for each cell.

    Returns:
        Those that other processes are still at.

    Raises:
        RunError: the file system has no locks, so that processes could not share the cells out.
    """
    waiting = [*cells[first:], *cells[:first]]
    for cell in waiting:
        with claimed(cell.folder) as is_ours:
            if is_ours and not cell.is_done:
                started = time.monotonic()
                cell.run()
                say(_line(cell, time.monotonic() - started, cells))
    return [cell for cell in cells if not cell.is_done]


def _line(cell: Cell, seconds: float, cells: Sequence[Cell]) -> str:
    result = cell.result()
    done = sum(other.is_done for other in cells)
    return (
        f"[{done}/{len(cells)}] {cell.name}, {cell.task.name}, {cell.label}: "
        f"{cell.task.metric} {100 * result['score']:.2f} (dev {100 * result['dev']:.2f}), "
        f"{seconds:.0f} s"
    )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process is the one that may work in a folder, until the end of the block.

    Raises:
        RunError: the folder cannot be made, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / ".lock", "wb")
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}), so results have nowhere to go; "
            "name another --output_dir"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise RunError(
                f"{folder} is on a file system without locks ({error.strerror}), so several "
                "processes would do the same work; name an --output_dir on another"
            ) from error
        yield True


def chosen(cells: Sequence[Cell], results: Mapping[Cell, dict[str, Any]]) -> list[Cell]:
    """The cells of the hyper-parameters that are best on the dev set, the median over seeds.

    Args:
        cells: of one model and task.
        results: of each.

    Returns:
        A cell a seed. Of equally good ones, the first.
    """
    groups: dict[tuple[float, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.training.learning_rate, cell.training.epochs), []).append(cell)
    return max(
        groups.values(), key=lambda group: statistics.median(results[c]["dev"] for c in group)
    )
