"""A task's examples, from files or the hub, checked and counted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.command import ConfigError, RunError
from pipeline.evaluation.layouts import PART, Example, Layout
from pipeline.evaluation.tasks import HUB_PARTS, TASKS, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What of a task's data is used.

    Args:
        parts: of those there are, the ones that are reported; () is all.
        train_parts: that are trained on together; () is the task's own, ("all",) all there are.
        max_train_examples: drawn from the training files by a seed that is always the same.
        max_eval_examples: the first ones of each part.
    """

    parts: tuple[str, ...] = ()
    train_parts: tuple[str, ...] = ()
    max_train_examples: int | None = None
    max_eval_examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The examples of a task; their labels are numbers where there are classes.

    Args:
        labels: classes or tags, by number.
        train: examples.
        dev: examples by part that hyper-parameters are chosen by.
        test: examples by part that are reported.
        reported: which files these are, "dev" or "test".
        sources: files below the data folder, or names on the hub.
        left_out: rows without a label, and training questions whose answer does not stand where it
            should, by split and part.
        digest: of all examples.
    """

    labels: tuple[str, ...]
    train: list[Example]
    dev: dict[str, list[Example]]
    test: dict[str, list[Example]]
    reported: str
    sources: list[str]
    left_out: dict[str, int]
    digest: str


def load(task: Task, data_dir: Path | None, limits: Limits) -> TaskData:
    """Read a task's examples.

    Args:
        task: of the table or the user's.
        data_dir: folder of files; None is the hub.
        limits: what of them is used.

    Raises:
        ConfigError: a file is not there; names where it was looked for.
        RunError: a file is damaged.
    """
    source = _Files(task, data_dir) if data_dir is not None else _FromHub(task)
    reported = "test" if source.parts("test") else "dev"
    parts = source.parts(reported)
    if not parts:
        source.refuse("dev", task.train_part or next(iter(task.parts), None))
    chosen = [part for part in parts if not limits.parts or part in limits.parts or part == ""]
    if not chosen:
        raise ConfigError(
            f"--languages={','.join(limits.parts)} has none of those in which {task.name} has "
            f"{reported} files there; choose of {', '.join(parts)}"
        )
    examples: dict[tuple[str, str], list[Example]] = {}
    dev_parts: list[str] = []
    if task.kind != "retrieval":
        for part in _train_parts(task, source, limits):
            examples["train", part] = source.read("train", part)
        there = source.parts("dev")
        dev_parts = [task.train_part] if task.train_part in there else there or [""]
        for part in dev_parts:
            examples["dev", part] = source.read("dev", part)
    for part in chosen:
        if (reported, part) in examples:
            continue
        if rows := source.read(reported, part):  # a file of all languages may lack one
            examples[reported, part] = rows
    labels = task.labels or _labels_of(task, examples)
    if task.kind == "classification" and "f1" in task.measured and len(labels) != 2:
        raise ConfigError(
            f"{task.name} measures f1, which is of the second of two labels, and has "
            f"{len(labels)}; use f1_macro"
        )
    left_out: dict[str, int] = {}
    for key, rows in examples.items():
        kept = [row for row in rows if not _is_unlabelled(task, row)]
        if key[0] == "train" and task.kind == "span":
            kept = [row for row in kept if _stands_where_it_says(row)]
        if missing := len(rows) - len(kept):
            left_out[" ".join(key).strip()] = missing
        if not kept:
            raise RunError(f"{task.name} has no labelled rows in {' '.join(key)}; get them anew")
        examples[key] = [_numbered(task, labels, row) for row in kept]
    train = list(itertools.chain(*(rows for key, rows in examples.items() if key[0] == "train")))
    if limits.max_train_examples is not None and limits.max_train_examples < len(train):
        train = random.Random(0).sample(train, limits.max_train_examples)
    of = {split: {part: rows[: limits.max_eval_examples] for (own, part), rows in examples.items()
                  if own == split} for split in ("dev", "test")}  # fmt: skip
    test = {part: of[reported][part] for part in chosen if part in of[reported]}
    return TaskData(
        labels=labels,
        train=train,
        dev={part: of["dev"][part] for part in dev_parts},
        test=test,
        reported=reported,
        sources=sorted(source.read_from),
        left_out=left_out,
        digest=_digest([train, dev_parts, of, labels]),
    )


def available(data_dir: Path) -> dict[str, str]:
    """The tasks of the table, and what each lacks in a folder; "" is nothing."""
    found = {}
    for task in TASKS.values():
        source = _Files(task, data_dir)
        try:
            parts = source.parts("test") or source.parts("dev")
            if not parts:
                source.refuse("dev", task.train_part or next(iter(task.parts), None))
            if task.kind != "retrieval":
                source.locate("train", task.train_part or "")
            found[task.name] = ""
        except ConfigError as error:
            found[task.name] = str(error)
    return found


class _Files:
    """A task's files in a folder."""

    def __init__(self, task: Task, data_dir: Path) -> None:
        if not data_dir.is_dir():
            raise ConfigError(f"--data_dir {data_dir} is not a folder; correct the path")
        self.task, self.data_dir = task, data_dir
        self.folders = [data_dir / task.folder, data_dir] if task.folder else [data_dir]
        self.read_from: set[str] = set()

    def layouts(self, split: str) -> tuple[Layout, ...]:
        found: tuple[Layout, ...] = getattr(self.task, split)
        return found

    def parts(self, split: str) -> list[str]:
        """Of a split those that have files, in the task's order; [""] where it has no parts."""
        layouts = self.layouts(split)
        named = set[str]().union(*(layout.parts(self.folders) for layout in layouts))
        candidates = self.task.parts or sorted(named) or ("",)
        return [part for part in candidates if self._find(split, part)]

    def _find(self, split: str, part: str) -> tuple[Layout, list[Path]] | None:
        for layout in self.layouts(split):
            if paths := layout.find(self.folders, part):
                return layout, paths
        return None

    def locate(self, split: str, part: str) -> tuple[Layout, list[Path]]:
        """The layout and files of a part, or a refusal."""
        return self._find(split, part) or self.refuse(split, part)

    def read(self, split: str, part: str) -> list[Example]:
        """All examples of a part."""
        layout, paths = self.locate(split, part)
        self.read_from |= {_below(path, self.data_dir) for path in paths}
        return [row for path in paths for row in layout.read(path, part)]

    def has_part(self, split: str) -> bool:
        """Whether its files are told apart by part."""
        found = self._find(split, self.task.train_part or "")
        return found is not None and PART in repr(found[0])

    def refuse(self, split: str, part: str | None) -> Any:
        """Name what was looked for."""
        paths = [layout.path.replace(PART, part or PART) for layout in self.layouts(split)]
        looked = [f"{folder}/{path}" for path in paths for folder in self.folders]
        unfit = [str(path) for path in map(Path, looked) if path.is_file()]
        why = f"; {unfit[0]} has other columns" if unfit else ""
        raise ConfigError(
            f"{self.task.name} needs {split} files, and none of these is there: "
            f"{', '.join(looked)}{why}; put the data there, or describe yours in a .yaml "
            "(docs/evaluation.md)"
        )


class _FromHub:
    """A task's data sets on the hub."""

    def __init__(self, task: Task) -> None:
        if task.hub is None:
            raise ConfigError(
                f"{task.name} is a task of files, so it needs --data_dir; name their folder"
            )
        self.task, self.hub = task, task.hub
        self.read_from: set[str] = set()

    def parts(self, split: str) -> list[str]:
        """Those that the hub is known to have."""
        if split not in self.hub.splits:
            return []
        return list(self.task.parts or HUB_PARTS.get(self.task.name, ("",)))

    def read(self, split: str, part: str) -> list[Example]:
        """All examples of a part."""
        hub = self.task.train_hub if split == "train" and self.task.train_hub else self.hub
        if split not in hub.splits:
            self.refuse(split, part)
        self.read_from.add(hub.path)
        return list(hub.read(split, part))

    def has_part(self, split: str) -> bool:
        """Whether its configurations are told apart by part."""
        return self.task.train_hub is None and PART in f"{self.hub.config}{self.hub.id_prefix}"

    def refuse(self, split: str, part: str | None) -> Any:
        """Name what is not there."""
        raise ConfigError(
            f"{self.task.name} needs {split} files, which {self.hub.path} on the hub does not "
            "have; give --data_dir with the files"
        )


def _train_parts(task: Task, source: _Files | _FromHub, limits: Limits) -> list[str]:
    asked = list(limits.train_parts)
    if not asked:
        return [task.train_part or ""]
    if not source.has_part("train"):
        raise ConfigError(
            f"--train_languages={','.join(asked)}, but {task.name}'s training files here are of "
            "one language; leave it out, or give files of each"
        )
    return source.parts("train") if asked == ["all"] else asked


def _labels_of(
    task: Task, examples: Mapping[tuple[str, str], Sequence[Example]]
) -> tuple[str, ...]:
    """The labels in the training files, sorted; () where the kind has none."""
    train = [row for key, rows in examples.items() if key[0] == "train" for row in rows]
    if task.kind == "tagging":
        return tuple(sorted({tag for row in train for tag in row.label}))
    if task.kind == "classification":
        found = {str(row.label) for row in train} - set(task.unlabelled)
        return tuple(sorted(task.renamed.get(label, label) for label in found))
    return ()


def _is_unlabelled(task: Task, row: Example) -> bool:
    if task.kind == "span":
        return not row.label and task.scorer != "squad2"
    return task.kind not in ("tagging", "retrieval") and str(row.label) in task.unlabelled


def _stands_where_it_says(row: Example) -> bool:
    """Whether a question's first answer is found at its place in the context."""
    return not row.label or row.texts[1].startswith(row.label[0].text, row.label[0].start)


def _numbered(task: Task, labels: tuple[str, ...], row: Example) -> Example:
    """The example with its class's number, or its number."""
    label: Any = row.label
    if task.kind in ("classification", "choice"):
        name = task.renamed.get(str(label), str(label))
        if name in labels:
            label = labels.index(name)
        elif name.isdecimal() and int(name) < len(labels):  # files that number the classes
            label = int(name)
        else:
            raise RunError(
                f"{task.name}, row {row.id} has the label {name!r}, which is none of "
                f"{', '.join(labels)}; correct the row, or name the labels in a .yaml"
            )
    elif task.kind == "regression":
        try:
            label = float(label)
        except ValueError as error:
            raise RunError(
                f"{task.name}, row {row.id} has the label {label!r}, which is no number; correct it"
            ) from error
    elif task.kind == "tagging" and (foreign := set(row.label) - set(labels)):
        raise RunError(
            f"{task.name}, sentence {row.id} has the tag {sorted(foreign)[0]!r}, which is none of "
            f"{', '.join(labels)}; correct it, or name the labels in a .yaml"
        )
    return row._replace(label=label)


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()
