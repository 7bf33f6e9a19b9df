"""Raw files to clean documents: reading, normalising, counting what was dropped and why."""

from __future__ import annotations

import collections
import dataclasses
import glob
import gzip
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.command import ConfigError, RunError
from data_prep.config import Prep

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
UNKNOWN = "und"  # ISO 639's code for a language that is not determined
_LANGUAGE = re.compile(r"[A-Za-z0-9_-]{1,32}")
_SPACES = re.compile(r"\s+")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")

# (language, text or None where it is broken, characters)
_Raw = tuple[str, str | None, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A cleaned text."""

    language: str
    text: str


class Counts(collections.Counter[tuple[str, str]]):
    """(language, what) -> number. What is counted: see docs/data_format.md."""


def find_inputs(globs: list[str]) -> list[Path]:
    """The files that the globs name, sorted, each once.

    Raises:
        ConfigError: a glob matches nothing, or a file of a kind that is not read.
    """
    found: set[Path] = set()
    for pattern in globs:
        matches = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
        if not matches:
            raise ConfigError(
                f"prep.input={pattern!r} matches no file, so its text would be missing from the "
                "corpus; correct the path or drop it"
            )
        found.update(matches)
    if unknown := sorted(str(path) for path in found if not path.name.endswith(SUFFIXES)):
        raise ConfigError(
            f"prep.input matches {unknown[0]!r}, which is not one of {', '.join(SUFFIXES)}; "
            "convert it or narrow the glob"
        )
    return sorted(found, key=lambda path: (path.name, str(path)))


def normalise(text: str) -> str:
    """NFC, no control characters, white space runs folded to one space, none at the ends."""
    text = unicodedata.normalize("NFC", text)
    return _SPACES.sub(" ", _CONTROLS.sub(" ", text)).strip()


def read_documents(path: Path, prep: Prep, counts: Counts) -> Iterator[Document]:
    """The documents of one file, cleaned, in order.

    What is dropped is counted in `counts` under its language and rule: `broken` (not UTF-8, not
    JSON, no text under prep.text_key; a broken line counts its bytes as characters) and `empty`.

    Raises:
        RunError: the file cannot be read to its end.
    """
    for language, text, size in _raw_documents(path, prep):
        counts[language, "documents_in"] += 1
        counts[language, "chars_in"] += size
        clean = "" if text is None else normalise(text)
        if clean:
            counts[language, "chars_normalised_away"] += size - len(clean)
            yield Document(language=language, text=clean)
        else:
            rule = "broken" if text is None else "empty"
            counts[language, f"documents_{rule}"] += 1
            counts[language, f"chars_{rule}"] += size


def _raw_documents(path: Path, prep: Prep) -> Iterator[_Raw]:
    stem = path.name.split(".")[0]
    file_language = stem if _LANGUAGE.fullmatch(stem) else UNKNOWN
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as stream:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                yield from _jsonl_documents(stream, prep, file_language)
            else:
                yield from _txt_documents(stream, file_language)
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(
            f"{path} cannot be read to its end ({error}), so its text would be missing from the "
            "corpus; mend the file, or take it out of prep.input"
        ) from error


def _jsonl_documents(lines: Iterable[bytes], prep: Prep, file_language: str) -> Iterator[_Raw]:
    """A document from each line that is not blank."""
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record[prep.text_key]
            text.encode("utf-8")  # a lone surrogate is not text
            language = record.get(prep.lang_key) or file_language
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield file_language, None, len(line)
            continue
        is_name = isinstance(language, str) and _LANGUAGE.fullmatch(language)
        yield (language if is_name else UNKNOWN), text, len(text)


def _txt_documents(lines: Iterable[bytes], file_language: str) -> Iterator[_Raw]:
    """Documents are separated by blank lines, as in CC-100."""
    document: list[bytes] = []

    def finish() -> _Raw:
        raw = b"".join(document)
        document.clear()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return file_language, None, len(raw)
        return file_language, text, len(text)

    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield finish()
    if document:
        yield finish()


def read_raw(unit, prep, faults):
    yield from _raw_documents(Path(unit.source.url), prep)
