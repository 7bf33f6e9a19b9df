"""Tasks of one's own: a YAML file in place of a row of the table, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data_prep.command import ConfigError, parse_recipe
from pipeline.evaluation.layouts import PART, Copa, Layout, Parallel, Squad, Table, Words
from pipeline.evaluation.tasks import METRICS, TASKS, KindName, Task

_MORE_METRICS = {"classification": ("f1",)}  # of two classes only
_NEEDED = {
    "classification": ("train", "dev"),
    "regression": ("train", "dev"),
    "span": ("train", "dev"),
    "tagging": ("train", "dev"),
    "retrieval": ("dev", "target"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTask:
    """A task of one's own, as a file says it.

    Args:
        base: a task of the table, whose settings hold where the file says nothing.
        kind: classification, regression, span, tagging or retrieval.
        train: path below the data folder; wildcards and {part} may stand in it.
        dev: the same, by which hyper-parameters are chosen, and which is reported without test.
        test: the same, which is reported.
        target: of retrieval: the file of translations, line by line.
        texts: columns of the text or the pair, by name, or by number from 0 where there is no
            header; for tagging the word's number, for retrieval the sentence's.
        label: column of the label, or of the tag (which may count from the end).
        quoted: whether fields may be in double quotes.
        labels: names of the classes or tags; default: those in the training files, sorted.
        metrics: what is measured; models are compared by the first.
        scorer: of span: squad, squad2 (with questions that have no answer) or mlqa.
        parts: what {part} stands for, languages mostly; default: whatever is there.
        train_part: the one that is trained on.
        max_length: tokens of an input at most.
    """

    base: str | None = None
    kind: KindName | None = None
    train: str | None = None
    dev: str | None = None
    test: str | None = None
    target: str | None = None
    texts: list[int | str] | None = None
    label: int | str | None = None
    quoted: bool = False
    labels: list[str] | None = None
    metrics: list[str] | None = None
    scorer: Literal["squad", "squad2", "mlqa"] | None = None
    parts: list[str] | None = None
    train_part: str | None = None
    max_length: int | None = None


def read_user_task(path: Path) -> Task:
    """The task that a YAML file describes; its name is the file's.

    Raises:
        ConfigError: an unknown key, a wrong type, or keys that make no task.
    """
    try:
        asked, _ = parse_recipe(
            UserTask, ["--config", str(path)], prog="task", description="a task"
        )
    except ConfigError as error:
        raise ConfigError(
            f"--tasks {path}: {str(error).replace('--config', 'the file')}"
        ) from error

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"--tasks {path}: {why}")

    base = known_task(asked.base) if asked.base is not None else None
    kind = asked.kind if base is None else base.kind
    if kind is None:
        raise refuse(f"neither kind nor base is set; set kind to one of {', '.join(METRICS)}")
    if asked.kind not in (None, kind):
        raise refuse(f"kind={asked.kind} is not that of base={asked.base}, {kind}; leave kind out")
    if kind == "choice" and base is None:
        raise refuse("kind=choice has no form of its own; use base: xcopa, or classification")
    needed = () if base else _NEEDED[kind]
    if kind in ("classification", "regression") and (asked.train or asked.dev or asked.test):
        needed = (*needed, "texts", "label")
    for key in needed:
        if getattr(asked, key) is None:
            raise refuse(f"kind={kind} needs {key!r}, which is not set; set it")
    columns = asked.texts or []
    if len({type(column) for column in columns}) > 1:
        raise refuse(f"texts={columns} mixes names and numbers; use the one or the other")
    if asked.texts == [] or len(columns) > (1 if kind in ("tagging", "retrieval") else 2):
        raise refuse(f"texts={columns} is not what {kind} reads; name one column, or a pair's")
    if kind in ("tagging", "retrieval") and not all(isinstance(c, int) for c in columns):
        raise refuse(f"texts={columns} has to be a number, since these files have no header")
    start = base or Task(name="", kind=kind, dev=(), max_length=384 if kind == "span" else 128)
    scorer = asked.scorer or start.scorer
    measurable = [*METRICS[kind], *start.measured, *_MORE_METRICS.get(kind, ())]
    measurable += ["best_f1", "best_exact"] if scorer == "squad2" else []
    if foreign := [name for name in asked.metrics or () if name not in measurable]:
        raise refuse(
            f"metrics has {foreign[0]!r}, which {kind} does not measure; choose of "
            f"{', '.join(dict.fromkeys(measurable))}"
        )
    train_part = asked.train_part or start.train_part
    if PART in (asked.train or "") and train_part is None:
        raise refuse("train has {part}, but train_part does not say which is trained on; set it")
    return dataclasses.replace(
        start,
        name=path.stem,
        train=_layout(asked, kind, asked.train) or start.train,
        dev=_layout(asked, kind, asked.dev) or start.dev,
        test=_layout(asked, kind, asked.test) or start.test,
        hub=None,
        train_hub=None,
        labels=tuple(asked.labels or start.labels),
        metrics=tuple(asked.metrics or start.metrics),
        parts=tuple(asked.parts or start.parts),
        scorer=scorer,
        train_part=train_part,
        max_length=asked.max_length or start.max_length,
    )


def _layout(asked: UserTask, kind: str, path: str | None) -> tuple[Layout, ...]:
    if path is None:
        return ()
    column = asked.texts[0] if asked.texts else None
    number = column if isinstance(column, int) else None
    if kind == "span":
        return (Squad(path=path),)
    if kind == "choice":
        return (Copa(path=path),)
    if kind == "retrieval":
        return (Parallel(path=path, target=asked.target or "", column=number),)
    if kind == "tagging":
        conllu = path.endswith(".conllu")
        word, tag = (1, 3) if conllu else (0, -1)
        return (
            Words(
                path=path,
                word=word if number is None else number,
                tag=asked.label if isinstance(asked.label, int) else tag,
                conllu=conllu,
            ),
        )
    texts = tuple(asked.texts or ())
    return (Table(path=path, texts=texts, label=asked.label, quoted=asked.quoted),)


def known_task(name: str) -> Task:
    """A task of the table.

    Raises:
        ConfigError: there is none of the name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
    raise ConfigError(
        f"there is no task {name!r}, so there is nothing to score; {remedy} A task of your own is "
        "a file that ends in .yaml"
    )


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks of the table by name, and those of files that end in .yaml.

    Raises:
        ConfigError: a name that is none, or twice there; a file that is wrong.
    """
    found = [
        read_user_task(Path(name)) if name.endswith((".yaml", ".yml")) else known_task(name)
        for name in names
    ]
    called = [task.name for task in found]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise ConfigError(f"--tasks names {twice[0]!r} twice; rename the file or leave one out")
    return found
