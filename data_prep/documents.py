"""Raw files to clean documents: reading, normalising, counting what was dropped and why."""

from __future__ import annotations

import collections
import dataclasses
import glob
import gzip
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.command import ConfigError
from data_prep.config import Prep

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
_LANGUAGE = re.compile(r"[A-Za-z0-9_-]{1,32}")
_SPACES = re.compile(r"\s+")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A cleaned text; `raw_chars` is its length before cleaning."""

    language: str
    text: str
    raw_chars: int


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
    """
    stem = path.name.split(".")[0]
    file_language = stem if _LANGUAGE.fullmatch(stem) else "und"
    texts = _jsonl_texts if ".jsonl" in path.name else _txt_texts
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as stream:
        for language, text, size in texts(stream, prep, file_language):
            counts[language, "documents_in"] += 1
            counts[language, "chars_in"] += size
            if text is None:
                counts[language, "documents_broken"] += 1
                counts[language, "chars_broken"] += size
                continue
            clean = normalise(text)
            if not clean:
                counts[language, "documents_empty"] += 1
                counts[language, "chars_empty"] += size
                continue
            counts[language, "chars_normalised_away"] += size - len(clean)
            yield Document(language=language, text=clean, raw_chars=size)


def _jsonl_texts(
    stream: BinaryIO, prep: Prep, file_language: str
) -> Iterator[tuple[str, str | None, int]]:
    """(language, text or None where it is broken, characters) of each line."""
    for line in stream:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record[prep.text_key]
            text.encode("utf-8")  # a lone surrogate is not text
            language = str(record.get(prep.lang_key) or file_language)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield file_language, None, len(line)
            continue
        yield (language if _LANGUAGE.fullmatch(language) else "und"), text, len(text)


def _txt_texts(
    stream: BinaryIO, prep: Prep, file_language: str
) -> Iterator[tuple[str, str | None, int]]:
    """Documents are separated by blank lines, as in CC-100."""
    lines: list[bytes] = []

    def document() -> tuple[str, str | None, int]:
        raw = b"".join(lines)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return file_language, None, len(raw)
        return file_language, text, len(text)

    for line in stream:
        if line.strip():
            lines.append(line)
        elif lines:
            yield document()
            lines.clear()
    if lines:
        yield document()
