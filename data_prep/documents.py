"""Raw documents of a unit of input: found, decoded and accounted for, in bounded memory."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import orjson

from data_prep import tables
from data_prep.command import ConfigError, RunError
from data_prep.config import Prep
from data_prep.sources import Unit
from data_prep.streams import BLOCK, COMPRESSED_BLOCK, DamageError, inflate, open_file, read_blocks

UNKNOWN = "und"  # ISO 639's code for a language that is not determined
MAX_TEXT = 2**26  # bytes of a text, and of a line; a longer one is broken
MAX_FAULTS = 1000  # that are listed of a unit; all are counted
_LANGUAGE = re.compile(r"[A-Za-z0-9_-]{1,32}")
# blank lines after the end of another; possessive, so that a megabyte of spaces is looked at once
_BLANK = re.compile(rb"\n(?:[ \t\r\x0b\x0c]*+\n)+")


class Raw(NamedTuple):
    """A document as it was found.

    Args:
        language: of the document, as docs/data_format.md says.
        text: as it stands there; None where it is broken.
        size: its characters; of a broken one, its bytes.
    """

    language: str
    text: str | None
    size: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that could not be read, and is counted as a broken document.

    Args:
        url: of the source.
        offset: where. In text, the byte of the file (of what it decompresses to, for a text
            within a compressed file); of damage to a compressed or Arrow file itself, the byte of
            that file as it lies there, at most a block before the damage; in tables, the row.
        reason: why, for a person.
        bytes: of input that are lost by it.
    """

    url: str
    offset: int
    reason: str
    bytes: int


def read_raw(unit: Unit, prep: Prep, faults: list[Fault]) -> Iterator[Raw]:
    """The documents of a unit, in order; for each fault, a broken one in its place.

    The sum of the sizes is what the unit holds. The rest of the file goes on after a fault,
    where there is a way on.

    Args:
        unit: of `sources.split`.
        prep: its text_key, lang_key and on_error count here.
        faults: gets the first MAX_FAULTS faults of this unit.

    Raises:
        ConfigError: a table has no column prep.text_key.
        RunError: the input cannot be read (a missing file, a server that does not answer); with
            prep.on_error "stop", at the first fault.
    """
    stem = unit.source.name.split(".")[0]
    file_language = stem if _LANGUAGE.fullmatch(stem) else UNKNOWN
    room = MAX_FAULTS
    for found in _found(unit, prep, file_language):
        if isinstance(found, Raw):
            yield found
            continue
        if prep.on_error == "stop":
            raise RunError(
                f"{unit.source.url} has a fault at {found.offset}: {found.reason}; "
                f'{found.lost} bytes would be left out, and prep.on_error is "stop"; mend it, or '
                'set "report" to count such losses and go on'
            )
        if room:
            faults.append(Fault(unit.source.url, found.offset, found.reason, found.lost))
            room -= 1
        yield Raw(file_language, None, found.lost)


def _found(unit: Unit, prep: Prep, file_language: str) -> Iterator[Raw | DamageError]:
    try:
        if unit.source.format == "jsonl":
            yield from _jsonl(unit, prep, file_language)
        elif unit.source.format == "txt":
            yield from _txt(unit, file_language)
        elif unit.source.format in ("csv", "tsv"):
            yield from _csv(unit, prep, file_language)
        else:
            yield from _table(unit, prep, file_language)
    except DamageError as damage:
        yield damage


def _language(value: object, file_language: str) -> str:
    if not value or value == file_language:
        return file_language
    return value if isinstance(value, str) and _LANGUAGE.fullmatch(value) else UNKNOWN


# Lines


class _Lines(NamedTuple):
    """Whole lines; `data` is None for a single one over MAX_TEXT."""

    offset: int
    data: bytes | None
    size: int


def _lines(unit: Unit, stream: BinaryIO, offset: int) -> Iterator[_Lines]:
    """All lines from a stream's position to its end, some at a time.

    Args:
        unit: tells the compression.
        stream: of the file as it lies there.
        offset: where the stream stands, which is where a line begins.

    Raises:
        DamageError: a compressed file is damaged; the unfinished line before it counts as lost.
        RunError: the file cannot be read, or became shorter.
    """
    source = unit.source
    if source.compression is None:
        blocks = read_blocks(stream, source.url, BLOCK)
    else:
        stored = read_blocks(stream, source.url, COMPRESSED_BLOCK)
        blocks = inflate(stored, source.compression, source.bytes)
    held: list[bytes] = []  # of a line that goes on
    size = 0
    try:
        for block in blocks:
            cut = block.rfind(b"\n") + 1
            if cut:
                first = block.find(b"\n") + 1
                if size + first > MAX_TEXT:
                    yield _Lines(offset, None, size + first)
                    offset += size + first
                    held = [block[first:cut]]
                else:
                    held.append(block[:cut])
                data = b"".join(held)
                if data:
                    yield _Lines(offset, data, len(data))
                offset += len(data)
                held, size = [], 0
                block = block[cut:]
            size += len(block)
            if size <= MAX_TEXT:
                held.append(block)
            else:
                held.clear()
    except DamageError as damage:
        damage.lost += size
        raise
    if source.compression is None and offset + size < source.bytes:
        raise RunError(
            f"{source.url} ends at byte {offset + size} and had {source.bytes} when it was found; "
            "leave the input alone while it is read, and start again"
        )
    if size > MAX_TEXT:
        yield _Lines(offset, None, size)
    elif (data := b"".join(held)).strip():
        yield _Lines(offset, data, size)


def _first_line(unit: Unit, stream: BinaryIO) -> int:
    """Seeks to the first line that begins at unit.start or later, at most just beyond unit.stop.

    Returns:
        The stream's position. At unit.stop or beyond, no line begins within the unit.
    """
    if unit.start == 0:
        return 0
    position = unit.start - 1
    stream.seek(position)
    for block in read_blocks(stream, unit.source.url, BLOCK):
        cut = block.find(b"\n") + 1
        position += cut or len(block)
        if cut or position >= unit.stop:
            break
    stream.seek(position)
    return position


def _stop(unit: Unit) -> int:
    """The byte, of a compressed file's decoded ones, that what begins there is not the unit's."""
    return unit.stop if unit.source.compression is None else sys.maxsize


def _jsonl(unit: Unit, prep: Prep, file_language: str) -> Iterator[Raw | DamageError]:
    """A document from each line that is not blank and begins within the unit."""
    stop, text_key, lang_key = _stop(unit), prep.text_key, prep.lang_key
    with open_file(unit.source.url, unit.source.bytes) as stream:
        for offset, data, size in _lines(unit, stream, _first_line(unit, stream)):
            if offset >= stop:
                return
            if data is None:
                yield _too_long(offset, size)
                continue
            if offset + size > stop:
                data = data[: data.find(b"\n", stop - 1 - offset) + 1 or size]
            if data.isspace():  # a bomb may be nothing else
                continue
            for line in io.BytesIO(data):
                try:
                    record = orjson.loads(line)
                    text = record[text_key]
                    if not isinstance(text, str):
                        raise TypeError
                    yield Raw(_language(record.get(lang_key), file_language), text, len(text))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    if not line.isspace():
                        yield _second_look(line, offset, prep, file_language)
                offset += len(line)


def _second_look(line: bytes, offset: int, prep: Prep, file_language: str) -> Raw | DamageError:
    """What the fast parser refuses: a byte order mark and numbers that are none are no harm."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        text = record[prep.text_key]
        text.encode("utf-8")
        return Raw(_language(record.get(prep.lang_key), file_language), text, len(text))
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except UnicodeEncodeError:
        reason = "a lone surrogate"
    except RecursionError:
        reason = "JSON nested too deep"
    except ValueError as error:
        reason = f"not JSON ({error})"
    except (KeyError, TypeError, AttributeError):
        reason = f"no text under {prep.text_key!r}"
    return DamageError(offset, reason, len(line))


def _too_long(offset: int, size: int, where: str = "", lost: int | None = None) -> DamageError:
    reason = f"a text of {size} bytes, over {MAX_TEXT}{where}"
    return DamageError(offset, reason, size if lost is None else lost)


def _bytes_if_too_long(text: str) -> int:
    """Bytes of a text over MAX_TEXT, 0 of any other."""
    size = len(text.encode()) if 4 * len(text) > MAX_TEXT else 0
    return size if size > MAX_TEXT else 0


def _txt(unit: Unit, file_language: str) -> Iterator[Raw | DamageError]:
    """Documents are separated by blank lines, as in CC-100; those that begin within the unit."""
    stop = _stop(unit)
    with open_file(unit.source.url, unit.source.bytes) as stream:
        first = _first_line(unit, stream)
        others = -1 if _follows_blank(unit, stream, first) else first  # begun in an earlier unit
        stream.seek(first)
        begin, size = first, 0  # of the document that is being read
        held: list[bytes] = []

        def finish() -> Raw | DamageError:
            raw = b"".join(held)
            held.clear()
            if size > MAX_TEXT:
                return _too_long(begin, size)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                return DamageError(begin, "not UTF-8", size)
            return Raw(file_language, text, len(text))

        try:
            for offset, data, length in _lines(unit, stream, first):
                if offset >= stop and (not size or begin == others):
                    return
                if data is None:  # one line of a document, which is too long with it
                    begin, size = (begin if size else offset), size + length
                    held.clear()
                    continue
                lines, at = b"\n" + data, 1  # so that a blank line follows a line's end
                for blank in itertools.chain(_BLANK.finditer(lines), (None,)):
                    end = blank.start() + 1 if blank else len(lines)
                    if at < end:
                        if not size:
                            begin = offset + at - 1
                            if begin >= stop:
                                return
                        size += end - at
                        if size <= MAX_TEXT:
                            held.append(lines[at:end])
                        else:
                            held.clear()
                    if blank:
                        if size and begin != others:
                            yield finish()
                        held.clear()
                        size, at = 0, blank.end()
        except DamageError as damage:
            damage.lost += size
            raise
        if size and begin != others:
            yield finish()


def _follows_blank(unit: Unit, stream: BinaryIO, position: int) -> bool:
    """Whether the line before the one that begins at `position` is blank, or there is none."""
    end = position - 1  # of what is still to be looked at, backwards
    while end > 0:
        if position - end > MAX_TEXT:
            return False
        start = max(0, end - BLOCK)
        stream.seek(start)
        kept = next(read_blocks(stream, unit.source.url, end - start)).rstrip(b" \t\r\x0b\x0c")
        end = start + len(kept)
        if kept:
            return kept.endswith(b"\n") and position - end <= MAX_TEXT
    return position <= MAX_TEXT


# Tables


def _csv(unit: Unit, prep: Prep, file_language: str) -> Iterator[Raw | DamageError]:
    """A document from each row below the header; a quoted field may hold line ends."""
    begin = position = 0  # of a row, in bytes; of what the parser has taken
    legible = True  # the row so far
    quotes = 0  # in it: within a quoted field their number is odd

    def decoded(stream: BinaryIO) -> Iterator[str]:
        nonlocal position, legible, quotes
        lines = _lines(unit, stream, 0)
        for offset, data, size in lines:
            if data is None:  # it may end within quotes, or not
                lost = size + sum(rest.size for rest in lines)
                raise DamageError(offset, f"a line of {size} bytes, over {MAX_TEXT}", lost)
            for line in io.BytesIO(data):
                position += len(line)
                quotes += line.count(b'"')
                try:
                    yield line.decode("utf-8" if begin else "utf-8-sig")
                except UnicodeDecodeError:
                    legible = False
                    yield line.decode("utf-8", "replace")

    csv.field_size_limit(MAX_TEXT)  # in characters, which are bytes at least
    dialect = "excel" if unit.source.format == "csv" else "excel-tab"
    with open_file(unit.source.url, unit.source.bytes) as stream:
        lines = decoded(stream)
        rows = csv.reader(lines, dialect, strict=True)
        try:
            header = next(rows, None)
        except csv.Error as error:
            raise ConfigError(
                f"{unit.source.url} begins with no header row ({error}), which prep.text_key names "
                "a column of; add one"
            ) from error
        if header is None:
            return
        if prep.text_key not in header:
            raise ConfigError(
                f"prep.text_key={prep.text_key!r} is no column of {unit.source.url}, so it would "
                f"give no text; its columns are {', '.join(header)}"
            )
        text_at = header.index(prep.text_key)
        lang_at = header.index(prep.lang_key) if prep.lang_key in header else len(header)
        while True:
            begin, legible, quotes = position, True, 0
            try:
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    reason = f"not a row of {unit.source.format} ({error})"
                    if "field limit" in reason:  # what follows in the field begins no row
                        while quotes % 2 and next(lines, None) is not None:
                            pass
                    yield DamageError(begin, reason, position - begin)
                    continue
            except DamageError as damage:
                damage.lost += position - begin
                raise
            if row is None:
                return
            if not legible:
                yield DamageError(begin, "not UTF-8", position - begin)
            elif text_at < len(row):
                language = row[lang_at] if lang_at < len(row) else None
                text = row[text_at]
                if size := _bytes_if_too_long(text):
                    yield _too_long(begin, size, lost=position - begin)
                    continue
                yield Raw(_language(language, file_language), text, len(text))
            elif row:
                yield DamageError(begin, f"no text under {prep.text_key!r}", position - begin)


def _table(unit: Unit, prep: Prep, file_language: str) -> Iterator[Raw | DamageError]:
    """A document from each row of a format with typed columns."""
    source, parts = unit.source, range(unit.start, unit.stop)
    columns = tables.Columns(prep.text_key, prep.lang_key)
    found: Iterator[tables.Rows | DamageError]
    if source.format == "hub":
        found = tables.read_hub(source.url, parts, columns)
    elif source.format == "folder":
        found = tables.read_folder(source.url, parts, columns)
    elif source.format == "arrow":
        found = tables.read_arrow(source.url, source.bytes, parts, columns)
    else:
        found = tables.read_parquet(source.url, source.bytes, parts, columns)
    for rows in found:
        if isinstance(rows, DamageError):
            yield rows
            continue
        pairs = zip(rows.texts, rows.languages, strict=True)
        for number, (text, language) in enumerate(pairs, rows.first):
            where = f" ({rows.part})" if rows.part else ""
            if isinstance(text, str):
                if size := _bytes_if_too_long(text):
                    yield _too_long(number, size, where)
                else:
                    yield Raw(_language(language, file_language), text, len(text))
            else:
                reason = f"no text under {prep.text_key!r}" if text is None else "not UTF-8"
                yield DamageError(number, reason + where, len(text or b""))
