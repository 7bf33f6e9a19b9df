"""Rows of Parquet, of Arrow and of Hugging Face datasets, as columns of text."""

from __future__ import annotations

import functools
import itertools
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.command import ConfigError, RunError, one_line, skip_unreachable_hub
from data_prep.streams import BOMB_BYTES, MAX_EXPANSION, DamageError, open_file

ROWS = 256  # of a batch: few, as a row can be a book
HUB = "datasets://"
STATE = "state.json"  # marks a folder of `datasets.save_to_disk`, and lists its files
_DAMAGED = (pa.ArrowException, OSError)
_ARROW_FILE = b"ARROW1"  # how the kind of Arrow file begins that has an index of its batches


class Rows(NamedTuple):
    """Some rows of a table.

    Args:
        part: of the source, that row numbers count within; "" is all of it.
        first: number of the first row.
        texts: str, or bytes where these are not UTF-8, or None where there is no text.
        languages: what the language column holds; None for each where there is no such column.
    """

    part: str
    first: int
    texts: list[str | bytes | None]
    languages: Sequence[Any]


class Columns(NamedTuple):
    """Names of the columns to read; that of the language may be absent from a table."""

    text: str
    language: str


def parquet_groups(url: str, size: int) -> list[int]:
    """Uncompressed bytes of each row group; of the file as one where it is too damaged to say.

    Raises:
        RunError: the file cannot be read.
    """
    with open_file(url, size) as stream:
        try:
            metadata = pq.read_metadata(stream)
        except _DAMAGED:  # reading will say so
            return [size]
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def read_parquet(
    url: str, size: int, groups: range, columns: Columns
) -> Iterator[Rows | DamageError]:
    """Rows of some row groups; a DamageError for each that cannot be read, and after it the next.

    Raises:
        ConfigError: there is no such text column.
        DamageError: the file has no legible footer.
        RunError: the file cannot be read.
    """
    with open_file(url, size) as stream:
        try:
            file = pq.ParquetFile(
                stream, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True
            )
        except _DAMAGED as error:
            raise DamageError(0, f"not Parquet ({one_line(error)})", size) from error
        names = _present(url, file.schema_arrow, columns)
        numbers = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        for group in groups:
            first, done = sum(numbers[:group]), 0
            try:
                stored = _stored_bytes(file.metadata.row_group(group))
                for batch in file.iter_batches(ROWS, [group], columns=names):
                    yield _rows("", first + done, batch, columns)
                    done += batch.num_rows
            except _DAMAGED as error:
                lost = stored * (numbers[group] - done) // max(numbers[group], 1)
                reason = f"row group {group} is damaged ({one_line(error)})"
                yield DamageError(first + done, reason, lost)


def _stored_bytes(group: Any) -> int:
    """Compressed bytes of a row group that does not claim to expand beyond all measure."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    for chunk in chunks:
        made, taken = chunk.total_uncompressed_size, chunk.total_compressed_size
        if made > BOMB_BYTES and made > MAX_EXPANSION * taken:
            raise pa.ArrowInvalid(f"column expands more than {MAX_EXPANSION} times")
    return sum(chunk.total_compressed_size for chunk in chunks)


def arrow_batches(url: str, size: int) -> int:
    """Record batches of an Arrow file; 1 for a stream, which can only be read from its start.

    Raises:
        RunError: the file cannot be read.
    """
    with open_file(url, size) as stream:
        try:
            if stream.read(len(_ARROW_FILE)) != _ARROW_FILE:
                return 1
            return int(pa.ipc.open_file(stream).num_record_batches)
        except _DAMAGED:  # reading will say so
            return 1


def read_arrow(
    url: str, size: int, batches: range, columns: Columns, part: str = ""
) -> Iterator[Rows | DamageError]:
    """Rows of some record batches of an Arrow file, or of all of a stream.

    Raises:
        ConfigError: there is no such text column.
        DamageError: nothing can be read from here on.
        RunError: the file cannot be read.
    """
    with open_file(url, size) as stream:
        try:
            indexed = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
            stream.seek(0)
            reader = pa.ipc.open_file(stream) if indexed else pa.ipc.open_stream(stream)
        except _DAMAGED as error:
            raise DamageError(0, f"not Arrow ({one_line(error)})", size) from error
        _present(url, reader.schema, columns)
        if not indexed:
            yield from _arrow_stream(reader, stream.tell, size, columns, part)
            return
        for index in batches:
            try:
                batch = reader.get_batch(index)
                yield from _slices(f"{part}record batch {index}", batch, columns)
            except _DAMAGED as error:
                lost = size // reader.num_record_batches
                yield DamageError(index, f"{part}record batch is damaged ({one_line(error)})", lost)


def _arrow_stream(
    reader: Any, tell: Callable[[], int], size: int, columns: Columns, part: str
) -> Iterator[Rows]:
    for index in itertools.count():
        before = tell()
        try:
            batch = reader.read_next_batch()
            yield from _slices(f"{part}record batch {index}", batch, columns)
        except StopIteration:
            return
        except _DAMAGED as error:
            reason = f"{part}not Arrow from record batch {index} on ({one_line(error)})"
            raise DamageError(before, reason, size - before) from error


def folder_files(folder: str) -> list[str]:
    """Names of the Arrow files of a folder of `datasets.save_to_disk`, in order.

    Raises:
        ConfigError: its list of files is missing or illegible.
    """
    try:
        with open(os.path.join(folder, STATE), encoding="utf-8") as stream:
            return [str(file["filename"]) for file in json.load(stream)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"prep.input names {folder!r}, whose {STATE} is not that of a dataset saved to disk "
            f"({one_line(error)}); save it again, or name its .arrow files"
        ) from error


def read_folder(folder: str, files: range, columns: Columns) -> Iterator[Rows | DamageError]:
    """Rows of some files of a folder of `datasets.save_to_disk`; as `read_arrow`."""
    names = folder_files(folder)
    for index in files:
        path = os.path.join(folder, names[index])
        try:
            size = os.path.getsize(path)
            yield from read_arrow(path, size, range(1), columns, f"{names[index]}, ")
        except OSError as error:
            raise RunError(f"{path} cannot be read ({one_line(error)}); restore it") from error
        except DamageError as damage:  # the other files are not damaged by it
            yield damage


class Hub(NamedTuple):
    """What a `datasets://` URL names: `datasets://OWNER/NAME?name=CONFIG&split=SPLIT&...`."""

    path: str
    name: str | None
    split: str
    revision: str | None
    lang: str | None


def parse_hub(url: str) -> Hub:
    """The parts of a `datasets://` URL.

    Raises:
        ConfigError: it names no dataset, or has parameters that there are not.
    """
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    path = urllib.parse.unquote(parts.netloc + parts.path).rstrip("/")
    known = Hub._fields[1:]
    if not path or (unknown := sorted(set(query) - set(known))):
        problem = f"an unknown parameter {unknown[0]!r}" if path else "no dataset in it"
        raise ConfigError(
            f"prep.input={url!r} has {problem}; write {HUB}OWNER/NAME?split=train, "
            f"or a folder as {HUB}/FOLDER, with any of {', '.join(known)}"
        )
    return Hub(
        path,
        query.get("name"),
        query.get("split", "train"),
        query.get("revision"),
        query.get("lang"),
    )


def open_hub(url: str) -> Any:
    """The rows of a dataset as Hugging Face's library streams them.

    Returns:
        A `datasets.IterableDataset`.

    Raises:
        ConfigError: there is no such dataset, configuration or split.
        RunError: the hub does not answer.
    """
    return _hub_builder(url).as_streaming_dataset(parse_hub(url).split)


@functools.lru_cache(maxsize=1)
def _hub_builder(url: str) -> Any:
    hub = parse_hub(url)
    skip_unreachable_hub(hub.path)
    import datasets  # half a second of import that only such sources need

    try:
        builder = datasets.load_dataset_builder(hub.path, hub.name, revision=hub.revision)
        builder.as_streaming_dataset(hub.split)
        return builder
    except ConnectionError as error:
        raise RunError(
            f"{url} cannot be reached ({one_line(error)}), so its text would be missing from the "
            "corpus; restore the connection and start again, or take it out of prep.input"
        ) from error
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"prep.input={url!r} opens no dataset ({one_line(error)}); correct its name, split, "
            "configuration or revision"
        ) from error


def hub_files(url: str) -> list[str]:
    """URLs, with the revision's hash, or paths of the files that a dataset's split is made of."""
    hub = parse_hub(url)
    return [str(file) for file in _hub_builder(url).config.data_files[hub.split]]


def read_hub(url: str, shards: range, columns: Columns) -> Iterator[Rows]:
    """Rows of some shards of a dataset; `open_hub(url).num_shards` says how many there are.

    Raises:
        ConfigError: there is no such text column.
        RunError: the hub or the dataset's files cannot be read; that library has tried again.
    """
    rows = open_hub(url)
    count = rows.num_shards
    for index in shards:
        done = 0
        tables = rows.shard(count, index).with_format("arrow").iter(ROWS)
        while True:
            try:
                table = next(tables, None)
            except Exception as error:  # each loader of that library has errors of its own
                raise RunError(
                    f"{url} cannot be read after row {done} of shard {index} "
                    f"({one_line(error) or type(error).__name__}), so its text would be missing "
                    "from the corpus; mend it and start again, or take it out of prep.input"
                ) from error
            if table is None:
                break
            _present(url, table.schema, columns)
            yield _rows(f"shard {index}", done, table.combine_chunks(), columns)
            done += table.num_rows


def _present(url: str, schema: Any, columns: Columns) -> list[str]:
    """Those of the columns that a table has, after a look at the text's type."""
    if columns.text not in schema.names:
        raise ConfigError(
            f"prep.text_key={columns.text!r} is no column of {url}, so it would give no text; its "
            f"columns are {', '.join(schema.names)}"
        )
    kind = schema.field(columns.text).type
    if not _is_text(kind):
        raise ConfigError(
            f"prep.text_key={columns.text!r} is a column of {kind} in {url}, and text is needed; "
            f"its columns are {', '.join(schema.names)}"
        )
    return [name for name in columns if name in schema.names]


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(
        (types.is_dictionary(kind) and _is_text(kind.value_type))
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )


def _slices(part: str, batch: Any, columns: Columns) -> Iterator[Rows]:
    for first in range(0, batch.num_rows, ROWS):
        yield _rows(part, first, batch.slice(first, ROWS), columns)


def _rows(part: str, first: int, batch: Any, columns: Columns) -> Rows:
    languages: Sequence[Any] = [None] * batch.num_rows
    if columns.language in batch.schema.names:
        languages = _values(batch.column(columns.language))
    return Rows(part, first, _values(batch.column(columns.text)), languages)


def _values(column: Any) -> list[Any]:
    """The column's values as Python's; a text that is not UTF-8 as bytes."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in _values(chunk)]
    if not _is_text(column.type):
        return list(column.to_pylist())
    if pa.types.is_dictionary(column.type):
        values, indices = _values(column.dictionary), column.indices.to_pylist()
        return [None if index is None else values[index] for index in indices]
    if pa.types.is_string_view(column.type):
        column.validate(full=True)
        column = column.cast(pa.large_string())
    kind = column.type
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    stored = column.view(pa.large_binary() if large else pa.binary())
    stored.validate(full=True)  # a damaged file's offsets could lead anywhere
    if kind == stored.type:
        return [_decoded(value) for value in stored.to_pylist()]
    try:
        return list(column.to_pylist())  # twice as fast as to decode here
    except UnicodeDecodeError:
        return [_decoded(value) for value in stored.to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError:
        return value
