"""How data sets lie on disk and on the hub: each layout finds its files and reads examples."""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.command import ConfigError, RunError, one_line

csv.field_size_limit(1 << 24)
PART = "{part}"  # in paths: a language, or one of several sets that are scored apart


class Answer(NamedTuple):
    """A passage of a context: its text, and its first character's place."""

    text: str
    start: int


class Example(NamedTuple):
    """One row of a data set; what `texts` and `label` are depends on the kind of the task.

    classification, regression: a text or a pair, and a class's name or a number. choice: what is
    asked and the answers to choose from, and the right one's place. span: question and context, and
    the answers (none where there is no answer). tagging: words, and their tags. retrieval: a
    sentence and its translation, and nothing.
    """

    id: str
    texts: tuple[str, ...]
    label: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Files that hold a split of a task.

    Args:
        path: below the data folder, may hold {part} and wildcards; all files that match are read,
            in the order of their names.
    """

    path: str

    def find(self, folders: Sequence[Path], part: str | None) -> list[Path]:
        """The files of a part in the first folder that has any."""
        if PART in self.path and not part:
            return []
        for folder in folders:
            pattern = str(Path(glob.escape(str(folder))) / self.path.replace(PART, part or ""))
            if paths := sorted(Path(name) for name in glob.glob(pattern)):
                return [path for path in paths if self.fits(path)]
        return []

    def parts(self, folders: Sequence[Path]) -> set[str]:
        """What stands for {part} in the names of files that exist."""
        if PART not in self.path:
            return set()
        pieces = [re.escape(piece).replace(r"\*", "[^/]*") for piece in self.path.split(PART)]
        pattern = pieces[0] + "([^/]+?)" + r"\1".join(pieces[1:])
        found: set[str] = set()
        for folder in folders:
            for path in folder.glob(self.path.replace(PART, "*")):
                if matched := re.fullmatch(pattern, path.relative_to(folder).as_posix()):
                    found.add(matched[1])
        return found

    def fits(self, path: Path) -> bool:
        """Whether a file that has the name has the form too."""
        return True

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """The examples of a file.

        Raises:
            RunError: it is damaged; names file and line.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Layout):
    """Rows of columns: tabs, commas in a `.csv`, objects in a `.jsonl`.

    Args:
        texts: columns of the text, by name, or by number from 0 where there is no header.
        label: column of the label; None where there is none (retrieval).
        quoted: whether fields may be in double quotes, as the csv module writes them.
        where: columns that must have a value, in which {part} may stand; other rows are others'.
        header: what the header begins with, to tell files of one name apart; () is anything.
        torn: whether rows that lack columns count as rows without a label (QQP's file has some);
            else they are errors.
    """

    texts: tuple[str | int, ...]
    label: str | int | None = None
    quoted: bool = False
    where: tuple[tuple[str, str], ...] = ()
    header: tuple[str, ...] = ()
    torn: bool = False

    @property
    def columns(self) -> list[str | int]:
        """All columns that are read."""
        label = [] if self.label is None else [self.label]
        return [*self.texts, *label, *(column for column, _ in self.where)]

    def fits(self, path: Path) -> bool:
        """Whether the header has the columns."""
        if path.suffix == ".jsonl" or isinstance(self.texts[0], int):
            return True
        names = self._header(path)
        return set(self.columns) <= set(names) and tuple(names[: len(self.header)]) == self.header

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """See Layout."""
        for number, row in self._rows(path):
            try:
                if any(
                    str(row[name]) != value.replace(PART, part or "") for name, value in self.where
                ):
                    continue
                texts = tuple(str(row[name]) for name in self.texts)
                label = None if self.label is None else row[self.label]
            except (KeyError, TypeError) as error:
                if self.torn:
                    yield Example(f"{part or ''}-{number}".lstrip("-"), (), None)
                    continue
                raise RunError(
                    f"{path}, row {number} has no column {one_line(error)}, so its label cannot be "
                    "told; get the file anew or correct the row"
                ) from error
            yield Example(f"{part or ''}-{number}".lstrip("-"), texts, label)  # fmt: skip

    def _rows(self, path: Path) -> Iterator[tuple[int, Mapping[Any, Any]]]:
        with open(path, encoding="utf-8", newline="" if self.quoted else "\n") as stream:
            if path.suffix == ".jsonl":
                for number, line in enumerate(stream):
                    yield number, _parsed(line, path, number)
                return
            lines = self._fields(stream, path)
            names: Sequence[str | int] | None = None
            if not isinstance(self.texts[0], int):
                names = next(lines)
            for number, fields in enumerate(lines):
                yield number, dict(zip(names or range(len(fields)), fields, strict=False))

    def _fields(self, stream: Any, path: Path) -> Iterator[list[str]]:
        delimiter = "," if path.suffix == ".csv" else "\t"
        if self.quoted:
            yield from csv.reader(stream, delimiter=delimiter)
        else:  # as lines, so that no character but a line feed ends a row
            yield from (line.rstrip("\r\n").split(delimiter) for line in stream)

    def _header(self, path: Path) -> list[str]:
        with open(path, encoding="utf-8", newline="" if self.quoted else "\n") as stream:
            return next(self._fields(stream, path), [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squad(Layout):
    """SQuAD's JSON: articles of paragraphs of questions.

    Args:
        id_prefix: of the questions that are read, in which {part} may stand; "" is all.
    """

    id_prefix: str = ""

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """See Layout."""
        prefix = self.id_prefix.replace(PART, _TYDIQA.get(part or "", part or ""))
        try:
            for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
                for paragraph in article["paragraphs"]:
                    for question in paragraph["qas"]:
                        answers = () if question.get("is_impossible") else question["answers"]
                        if not question["id"].startswith(prefix):
                            continue
                        label = tuple(Answer(a["text"], int(a["answer_start"])) for a in answers)
                        texts = (question["question"], paragraph["context"])
                        yield Example(question["id"], texts, label)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} is not SQuAD's JSON ({type(error).__name__}: {one_line(error)}), so it "
                "cannot be read; get the file anew"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(Layout):
    """A word a line with columns behind it, sentences apart by empty lines: CoNLL, CoNLL-U, PAN-X.

    Args:
        word: column of the word, from 0.
        tag: column of the tag; negative counts from the end.
        prefix: in front of words, in which {part} may stand ("en:" in WikiANN's files).
        conllu: whether lines with # are comments, and ids such as 3-4 and 5.1 no words.
    """

    word: int = 0
    tag: int = -1
    prefix: str = ""
    conllu: bool = False

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """See Layout."""
        prefix = self.prefix.replace(PART, part or "")
        words: list[str] = []
        tags: list[str] = []
        with open(path, encoding="utf-8", newline="\n") as stream:
            sentences = 0
            for number, line in enumerate([*stream, "\n"]):
                fields = line.rstrip("\r\n").split("\t" if "\t" in line else None)
                if not line.strip():
                    if words:
                        yield Example(
                            f"{part or ''}-{sentences}".lstrip("-"), tuple(words), tuple(tags)
                        )
                        sentences += 1
                    words, tags = [], []
                elif self.conllu and (line[0] == "#" or not fields[0].isdecimal()):
                    continue
                elif len(fields) < 2:
                    raise RunError(
                        f"{path}, line {number + 1} has a word and no tag, so the sentence cannot "
                        "be scored; get the file anew or correct the line"
                    )
                else:
                    words.append(fields[self.word].removeprefix(prefix))
                    tags.append(fields[self.tag])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copa(Layout):
    """COPA's and XCOPA's `.jsonl`: what was the cause, or the effect, of a premise."""

    ASKED = {"cause": "What was the cause?", "effect": "What happened as a result?"}  # noqa: RUF012

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """See Layout."""
        with open(path, encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream):
                row = _parsed(line, path, number)
                yield self.example(f"{part or ''}-{number}".lstrip("-"), row)

    @classmethod
    def example(cls, name: str, row: Mapping[str, Any]) -> Example:
        """From a row's fields."""
        asked = f"{row['premise']} {cls.ASKED[row['question']]}"
        return Example(name, (asked, row["choice1"], row["choice2"]), row["label"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Layout):
    """Two files that are each other's translation line by line, such as Tatoeba's.

    Args:
        target: the other file's ending, which replaces the first one's.
        texts: columns, for rows with more than the sentence; see Table. None is the whole line.
    """

    target: str
    column: int | None = None

    def find(self, folders: Sequence[Path], part: str | None) -> list[Path]:
        """The first file of the pair, where both are."""
        found = super().find(folders, part)
        return [path for path in found if self._other(path, part).is_file()]

    def read(self, path: Path, part: str | None) -> Iterator[Example]:
        """See Layout."""
        sides = [self._lines(path), self._lines(self._other(path, part))]
        if len(sides[0]) != len(sides[1]):
            raise RunError(
                f"{path} has {len(sides[0])} lines, its translation {len(sides[1])}, so that they "
                "are not parallel; get both anew"
            )
        for number, texts in enumerate(dict.fromkeys(zip(*sides, strict=True))):
            yield Example(f"{part or ''}-{number}".lstrip("-"), texts, None)

    def _other(self, path: Path, part: str | None) -> Path:
        own = self.path.replace(PART, part or "")
        start = str(path)[: len(str(path)) - len(own)]
        return Path(start + self.target.replace(PART, part or ""))

    def _lines(self, path: Path) -> list[str]:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if self.column is None:
            return [line.strip() for line in lines]
        return [line.split("\t")[self.column].strip() for line in lines]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the hub.

    Args:
        path: its id there.
        config: its configuration, in which {part} may stand.
        splits: its names of train, dev and test; a task without test has none. {part} may stand
            there too.
        texts: columns of the text; () where it has SQuAD's or COPA's fields.
        label: column of the label.
        id_prefix: see Squad.
        config_of: configurations' own names of parts.
    """

    path: str
    config: str | None
    splits: Mapping[str, str]
    texts: tuple[str, ...] = ()
    label: str = "label"
    id_prefix: str = ""
    config_of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, split: str, part: str | None) -> Iterator[Example]:
        """The examples of a split.

        Raises:
            ConfigError: it cannot be had.
        """
        import datasets

        named = self.config_of.get(part or "", part or "")
        config = None if self.config is None else self.config.replace(PART, named)
        try:
            rows = datasets.load_dataset(
                self.path, config, split=self.splits[split].replace(PART, part or "")
            )
        except Exception as error:  # whatever the network or the hub's answer may provoke
            raise ConfigError(
                f"{self.path} ({config or 'default'}, {self.splits[split]}) cannot be had from the "
                f"hub ({one_line(error)}); connect to it, or give --data_dir with the files"
            ) from error
        label_names = _label_names(rows.features.get(self.label))
        prefix = self.id_prefix.replace(PART, _TYDIQA.get(part or "", part or ""))
        for number, row in enumerate(rows):
            name = f"{part or ''}-{number}".lstrip("-")
            if "choice1" in row:
                yield Copa.example(name, row)
            elif "context" in row:
                if row["id"].startswith(prefix):
                    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    answers = tuple(Answer(*pair) for pair in pairs)
                    yield Example(row["id"], (row["question"], row["context"]), answers)
            elif "tokens" in row:
                tags = tuple(label_names.get(tag, str(tag)) for tag in row[self.label])
                yield Example(name, tuple(row["tokens"]), tags)
            else:
                yield Example(name, tuple(row[t] for t in self.texts), row.get(self.label))


# What TyDi QA calls languages in the ids of its questions.
_TYDIQA = {
    "ar": "arabic", "bn": "bengali", "en": "english", "fi": "finnish", "id": "indonesian",
    "ko": "korean", "ru": "russian", "sw": "swahili", "te": "telugu",
}  # fmt: skip


def _label_names(feature: Any) -> dict[int, str]:
    """The names of a column of class numbers, or of lists of them."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return dict(enumerate(names or ()))


def _parsed(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RunError(
            f"{path}, line {number + 1} is not JSON ({one_line(error)}); get the file anew"
        ) from error
    if not isinstance(row, dict):
        raise RunError(f"{path}, line {number + 1} is no JSON object; get the file anew")
    return row
