"""What there is to read, and how it divides into units of work."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterator, Sequence

import fsspec

from data_prep import tables
from data_prep.command import ConfigError, RunError, one_line
from data_prep.config import Prep
from data_prep.streams import DECODERS, is_remote, may_pass, open_file, patiently

TEXTS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "tsv"}
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
KINDS = (
    f"{', '.join(TEXTS)} (each plain or with {', '.join('.' + name for name in DECODERS)}), "
    f"{', '.join(TABLES)}, a folder of datasets.save_to_disk, or {tables.HUB}OWNER/NAME"
)
_WHOLE_BYTES = 2**20  # a file up to this size is digested whole
_SAMPLE_BYTES = 4096
_SAMPLES = 16  # of a larger one
_THREADS = 16  # that look at files at the same time: nearly all of it is waiting


@dataclasses.dataclass(frozen=True)
class Source:
    """One input.

    Args:
        url: absolute path, fsspec URL or `datasets://` URL.
        name: its last part, which may begin with a language.
        bytes: as it lies there, compressed or not; 0 where the hub does not say.
        format: "jsonl", "txt", "csv", "tsv", "parquet", "arrow", "folder" (of save_to_disk) or
            "hub".
        compression: "gz", "xz", "zst" or "bz2"; None is none.
        digest: names the content: sha256 over size and samples, or the hub's revision. Of a file
            over 1 MiB it misses a change between two samples that keeps the size.
        pool: place in `Prep.pools`, of `with_pools`.
    """

    url: str
    name: str
    bytes: int
    format: str
    compression: str | None
    digest: str
    pool: int = 0


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that is read on its own; the units of a source are all of it, in order.

    Args:
        source: the whole.
        start: first byte, row group, record batch, file of a folder or shard of the hub's.
        stop: one beyond the last.
        bytes: of input, uncompressed where that is known: a measure of the work.
    """

    source: Source
    start: int
    stop: int
    bytes: int


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The inputs that patterns name, by name and then URL, each once.

    Args:
        patterns: paths, fsspec URLs, both with `*`, `?`, `[...]` and `**`, or `datasets://` URLs.
            Folders are read where `datasets.save_to_disk` wrote them, and passed over otherwise.

    Raises:
        ConfigError: a pattern matches nothing, or something of a kind that is not read, or a
            symbolic link that leads nowhere or in a circle.
        RunError: a file cannot be read.
    """
    found: dict[str, int | None] = {}  # url -> bytes, where they are known
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise ConfigError(
                f"prep.input={pattern!r} matches no file, so its text would be missing from the "
                "corpus; correct the path or drop it"
            )
        found.update(matches)
    # the files of a folder that is read as one are no sources of their own
    kept = {url: size for url, size in found.items() if os.path.dirname(url) not in found}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        sources = threads.map(_source, kept.keys(), kept.values())
        return sorted(sources, key=lambda source: (source.name, source.url))


def reading_digest(source: Source, prep: Prep) -> str:
    """Names what is read of a source: its content, its format, and the keys it is read under."""
    keys = [] if source.format == "txt" else [prep.text_key, prep.lang_key]
    return _sha256(json.dumps([source.digest, source.format, *keys]))


def with_pools(sources: Sequence[Source], prep: Prep) -> list[Source]:
    """The sources, each with the pool that `prep.source_weights` puts it in.

    Raises:
        ConfigError: a glob names none of them, or two globs name the same one.
        RunError: a glob cannot be looked up.
    """
    found: dict[str, int] = {}  # url -> place of its pool
    pools = prep.pools
    for place, pool in enumerate(pools):
        if not pool.glob:
            continue
        matches = _matches(pool.glob, "prep.source_weights")
        matched = [source.url for source in sources if source.url in matches]
        if not matched:
            raise ConfigError(
                f"prep.source_weights names {pool.glob!r}, which is none of the files of "
                "prep.input, so the weight would do nothing; write it as in prep.input"
            )
        for url in matched:
            if url in found:
                raise ConfigError(
                    f"prep.source_weights gives {url} two weights, by {pools[found[url]].glob!r} "
                    f"and {pool.glob!r}; narrow one of them"
                )
            found[url] = place
    others = [pool.glob for pool in pools].index("")
    return [dataclasses.replace(source, pool=found.get(source.url, others)) for source in sources]


def _matches(pattern: str, key: str = "prep.input") -> dict[str, int | None]:
    """What a pattern of the recipe's key matches: url -> bytes, where they are known."""
    if pattern.startswith(tables.HUB):
        return {pattern: None}
    if is_remote(pattern) and not pattern.startswith(("file://", "local://")):
        return dict(_remote_matches(pattern, key))
    return dict.fromkeys(_local_matches(pattern.partition("://")[2] or pattern, key))


def _local_matches(pattern: str, key: str) -> Iterator[str]:
    if "**" in pattern:
        _refuse_circles(pattern, key)
    for match in glob.glob(pattern, recursive=True):
        path = os.path.abspath(match)
        if os.path.islink(path) and not os.path.exists(path):
            raise ConfigError(
                f"{key}={pattern!r} matches {path!r}, a symbolic link that leads nowhere or "
                "in a circle; mend or remove it"
            )
        if os.path.isfile(path) or os.path.isfile(os.path.join(path, tables.STATE)):
            yield path


def _refuse_circles(pattern: str, key: str) -> None:
    """Refuse a folder that contains itself: `**` would go round it, and two would take for ever."""
    root = pattern.partition("**")[0]
    root = os.path.dirname(root) or os.curdir
    for top in glob.glob(root) if glob.has_magic(root) else [root]:
        above: dict[str, tuple[str, ...]] = {top: ()}  # folder -> real paths of those it lies in
        for folder, folders, _ in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            ancestors = above.pop(folder)
            if real in ancestors:
                raise ConfigError(
                    f"{key}={pattern!r} would look into {folder!r} for ever, a symbolic link "
                    "to a folder that it lies in; remove the link or narrow the pattern"
                )
            above.update({os.path.join(folder, name): (*ancestors, real) for name in folders})


def _remote_matches(pattern: str, key: str) -> Iterator[tuple[str, int | None]]:
    # a question mark begins the query of a web address
    magic = "*" in pattern if pattern.startswith("http") else glob.has_magic(pattern)
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        if magic:
            details = patiently()(system.glob, path, detail=True)
        else:
            details = {path: patiently()(system.info, path)}
    except Exception as error:  # each of fsspec's file systems has errors of its own
        why = one_line(error.__cause__ or error) or type(error).__name__
        if may_pass(error):
            raise RunError(
                f"{pattern} cannot be looked up ({why}), so its text would be missing from the "
                "corpus; mend the connection and start again, or take it out of prep.input"
            ) from error
        if isinstance(error, FileNotFoundError):
            return
        raise ConfigError(
            f"{key}={pattern!r} cannot be looked up ({why}); correct it, or install the "
            "package that its file system needs (s3fs, gcsfs, ...)"
        ) from error
    for name, info in details.items():
        if info["type"] == "file":
            yield system.unstrip_protocol(name), info.get("size")


def _source(url: str, size: int | None) -> Source:
    if url.startswith(tables.HUB):
        return _hub_source(url)
    name = os.path.basename(urllib.parse.urlsplit(url).path if is_remote(url) else url)
    if not is_remote(url) and os.path.isdir(url):
        files = [os.path.join(url, file) for file in tables.folder_files(url)]
        digests = [_digest(file, _size(file)) for file in files]
        size = sum(map(_size, files))
        return Source(url, name, size, "folder", None, _sha256(*digests))
    kind, compression = _kind(url, name)
    if not is_remote(url):
        size = _size(url)
    if size is None:
        raise ConfigError(
            f"prep.input names {url}, whose server does not say how large it is, so it cannot be "
            "read in parts; download it first"
        )
    return Source(url, name, size, kind, compression, _digest(url, size))


def _kind(url: str, name: str) -> tuple[str, str | None]:
    stem, suffix = os.path.splitext(name)
    if suffix in TABLES:
        return TABLES[suffix], None
    compression = suffix[1:] if suffix[1:] in DECODERS else None
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix not in TEXTS:
        raise ConfigError(
            f"prep.input matches {url!r}, which is not one of {KINDS}; convert it or narrow the "
            "pattern"
        )
    return TEXTS[suffix], compression


def _digest(url: str, size: int) -> str:
    """Names the content of a file without reading all of a large one."""
    if size <= _WHOLE_BYTES:
        spans = [(0, size)]
    else:
        last = size - _SAMPLE_BYTES
        spans = [(last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]
    samples = [str(size).encode()]
    with open_file(url, size, buffer_bytes=_SAMPLE_BYTES) as stream:
        for start, length in spans:
            stream.seek(start)
            samples.append(stream.read(length))
    return _sha256(*samples)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be found any more ({one_line(error)}), so its text would be missing "
            "from the corpus; restore it, or take it out of prep.input"
        ) from error


def _sha256(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _hub_source(url: str) -> Source:
    hub = tables.parse_hub(url)
    files = tables.hub_files(url)
    # the hub's URLs carry the revision; a local dataset's files are looked at
    names = [file if is_remote(file) else _digest(file, _size(file)) for file in files]
    name = hub.lang or hub.name or os.path.basename(hub.path)
    return Source(url, name, 0, "hub", None, _sha256(hub.name or "", hub.split, *names))


def split(source: Source, unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes`, in order; larger where a source divides no further.

    Plain .jsonl and .txt divide at any byte, Parquet at row groups, Arrow files at record batches,
    folders of save_to_disk at files and the hub's datasets at shards. Whole remain what is
    compressed, Arrow streams, and .csv and .tsv, of which no byte tells whether it is quoted.

    Args:
        source: of `find_sources`.
        unit_bytes: at least 1.

    Raises:
        RunError: the source cannot be read.
    """
    whole = source.bytes
    if source.format in ("jsonl", "txt") and source.compression is None:
        edges = [*range(0, whole, unit_bytes), whole]
        return [Unit(source, a, b, b - a) for a, b in itertools.pairwise(edges)]
    if source.format == "parquet":
        sizes = tables.parquet_groups(source.url, whole)
    elif source.format == "arrow":
        batches = tables.arrow_batches(source.url, whole)
        sizes = [whole // max(batches, 1)] * batches
    elif source.format == "folder":
        sizes = [_size(os.path.join(source.url, file)) for file in tables.folder_files(source.url)]
    elif source.format == "hub":
        shards = tables.open_hub(source.url).num_shards
        return [Unit(source, i, i + 1, 0) for i in range(shards)]
    else:
        return [Unit(source, 0, whole, whole)]
    return _gathered(source, sizes, unit_bytes)


def _gathered(source: Source, sizes: Sequence[int], unit_bytes: int) -> list[Unit]:
    units, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= unit_bytes or index == len(sizes) - 1:
            units.append(Unit(source, start, index + 1, held))
            start, held = index + 1, 0
    return units
