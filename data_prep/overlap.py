"""Documents that hold text of an evaluation set: a student must not have trained on it."""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from data_prep.command import ConfigError, RunError, one_line
from data_prep.shingles import shingles

_FIELD_LIMIT = 1 << 30  # characters in a field of a .csv; the library's own limit refuses articles


class Overlap:
    """The runs of words of evaluation files, to look documents up in.

    Any run of `ngram` words that a text of a file has (see `shingles` for what a word is) marks a
    document that has it too. Texts of fewer words mark nothing: chance alone repeats them.
    """

    def __init__(self, globs: Sequence[str], ngram: int) -> None:
        """Read the files.

        Args:
            globs: of .json, .jsonl, .tsv, .csv and .txt files, each also gzipped (.gz). Of JSON,
                every string at any depth is a text; of tables, every field; of .txt, paragraphs.
            ngram: words in a run.

        Raises:
            ConfigError: a glob that matches no file, a file of another kind or that does not
                parse, or files without any run of that length.
            RunError: a file that cannot be read to its end.
        """
        self.files = [str(path) for path in find_files(globs)]
        """The evaluation files, sorted."""
        runs: list[NDArray[np.uint64]] = []
        for path in self.files:
            # n words are n characters and n - 1 between them at least, more in other scripts
            texts = {text for text in _texts(Path(path)) if len(text) >= 2 * ngram - 1}
            of_texts = [shingles(text, ngram) for text in texts]
            runs.append(np.unique(np.concatenate([np.zeros(0, np.uint64), *of_texts])))
            if not len(runs[-1]):
                raise ConfigError(
                    f"prep.exclude: {path} holds no text of {ngram} words or more, so it would "
                    "exclude nothing; drop it, or lower prep.exclude_ngram"
                )
        # Of files that share a run, the first has it.
        self._runs, first = np.unique(np.concatenate(runs), return_index=True)
        file_of_run = np.repeat(np.arange(len(runs), dtype=np.int32), [len(run) for run in runs])
        self._file_of_run = file_of_run[first]
        # A table by the hashes' leading bits, at most 1/16 full, turns most documents away at the
        # price of one look into it.
        bits = max(16, (16 * len(self._runs) - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._may_be_run = np.zeros(1 << bits, bool)
        self._may_be_run[self._runs >> self._shift] = True
        self._ngram = ngram

    def matches(self, text: str) -> str | None:
        """The evaluation file that the document overlaps with.

        Args:
            text: of the document, without lone surrogates.

        Returns:
            The file of the document's first run that is in any file; None where there is none.
        """
        runs = shingles(text, self._ngram)
        # Indexed by int64: numpy would first convert uint64, at twenty times the cost of the look.
        runs = runs[self._may_be_run.take((runs >> self._shift).view(np.int64))]
        at = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        hits = at[self._runs[at] == runs]
        return self.files[self._file_of_run[hits[0]]] if len(hits) else None


def find_files(globs: Sequence[str]) -> list[Path]:
    """The evaluation files that globs name, sorted.

    Raises:
        ConfigError: a glob matches no file, or one of a kind that is not read.
    """
    found: set[Path] = set()
    for pattern in globs:
        matches = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not matches:
            raise ConfigError(
                f"prep.exclude={pattern!r} matches no file, so its texts would stay in the corpus; "
                "correct the path or drop it"
            )
        found.update(matches)
    for path in sorted(found):
        if _suffix(path) not in _READERS:
            raise ConfigError(
                f"prep.exclude matches {str(path)!r}, which is not one of {', '.join(_READERS)} "
                "(or these with .gz); convert it or narrow the glob"
            )
    return sorted(found)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _texts(path: Path) -> Iterator[str]:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            for text in _READERS[_suffix(path)](stream):
                text.encode("utf-8")  # a lone surrogate is not text
                yield text
    except (ValueError, csv.Error, RecursionError) as error:
        raise ConfigError(
            f"prep.exclude: {path} is not UTF-8 {_suffix(path)[1:]} ({one_line(error)}), so its "
            "texts would stay in the corpus; correct or drop it"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(
            f"{path} cannot be read to its end ({error}), so its texts would stay in the corpus; "
            "mend the file, or take it out of prep.exclude"
        ) from error


def _json_texts(stream: TextIO) -> Iterator[str]:
    yield from _strings(json.load(stream))


def _jsonl_texts(stream: TextIO) -> Iterator[str]:
    for line in stream:
        if line.strip():
            yield from _strings(json.loads(line))


def _strings(value: Any) -> Iterator[str]:
    """Every string in it, at any depth, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_strings, value))
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_strings, value.values()))


def _tsv_texts(stream: TextIO) -> Iterator[str]:
    """Quotation marks are text here, as in GLUE's files."""
    for line in stream:
        yield from line.split("\t")


def _csv_texts(stream: TextIO) -> Iterator[str]:
    csv.field_size_limit(_FIELD_LIMIT)
    yield from itertools.chain.from_iterable(csv.reader(stream, strict=True))


def _txt_texts(stream: Iterable[str]) -> Iterator[str]:
    """Paragraphs, between blank lines."""
    for is_text, lines in itertools.groupby(stream, key=lambda line: bool(line.strip())):
        if is_text:
            yield "".join(lines)


_READERS: dict[str, Callable[[TextIO], Iterator[str]]] = {
    ".json": _json_texts,
    ".jsonl": _jsonl_texts,
    ".tsv": _tsv_texts,
    ".csv": _csv_texts,
    ".txt": _txt_texts,
}
