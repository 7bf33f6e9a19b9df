"""The shard format: WebDataset tars of packed rows, and the manifest that makes them a data set.

A sample of a tar is a *block* of rows: `KEY.input_ids.npy` [rows, seq_len] (uint16 where the
vocabulary fits, else uint32), `KEY.cu_seqlens.npy` (int32 segment boundaries over the flattened
block, strictly increasing from 0 to rows * seq_len) and `KEY.json`. No segment crosses a row. A
segment is `<s> ... </s>` of one document; what is left of a row is padding, in a segment of its
own.

`manifest.json` is written last and atomically: a folder without one is an unfinished preparation.
It holds each block's byte range and CRC, so that any block is one ranged and checked read away.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.block_cache import BlockCache
from data_prep.command import ConfigError, RunError, one_line
from data_prep.durable import durable_write, write_durably
from data_prep.storage import Storage

FORMAT_VERSION = 2  # 1 had no generations, sources and segment lengths; it is still read
MANIFEST = "manifest.json"
EARLIER = "manifests"  # folder of the manifests of earlier generations
Verify = Literal["first_read", "always", "never"]
_TAR_BLOCK = 512
_ARRAYS = ("input_ids", "cu_seqlens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Where one sample lies: `bytes` from `offset` of the tar hold all its members.

    `crc32` is over exactly those bytes, so that a reader notices damage before it trains on it.
    """

    offset: int
    bytes: int
    rows: int
    crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file. `language` is set for held-out shards, which hold one language each."""

    name: str
    bytes: int
    sha256: str
    rows: int
    language: str | None
    blocks: tuple[Block, ...]

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Shard:
        """From what `dataclasses.asdict` gave."""
        return cls(**{**body, "blocks": tuple(Block(**block) for block in _listed(body, "blocks"))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know of a folder of shards.

    Args:
        settings: digest of inputs and settings, by which a restart knows its own work.
        seq_len: token ids in a row.
        vocab_size: ids that the tokenizer can give.
        tokenizer: hub id or folder that it was loaded from; empty where it is not known.
        tokenizer_fingerprint: see `tokenizer_fingerprint`.
        special_ids: `cls`, `sep` and `pad`.
        seed: of the shuffle and of the held-out choice.
        generation: 1, and one more each time that text was added.
        rows: rows to train on, without the held-out ones.
        heldout_rows: rows of each held-out language.
        tokens: tokens to train on of each language, padding excluded.
        segment_lengths: language -> power of two that a segment's tokens reach -> segments.
        accounting: characters and documents of each language: in, kept, dropped by which rule.
        sources: digest -> name of each file that the text is from.
        shards: the tars, training ones first.
    """

    settings: str
    seq_len: int
    vocab_size: int
    tokenizer_fingerprint: str
    special_ids: dict[str, int]
    seed: int
    rows: int
    heldout_rows: dict[str, int]
    tokens: dict[str, int]
    accounting: dict[str, dict[str, int]]
    shards: tuple[Shard, ...]
    tokenizer: str = ""
    generation: int = 1
    segment_lengths: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all that it says."""
        return str(json.loads(self.to_json())["digest"])

    def to_json(self) -> str:
        """Canonical JSON, with the format version and a digest of all the rest."""
        body = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**body, "digest": _digest(body)}, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            RunError: it is not JSON, of another version, or not what was written.
        """
        return cls._of(_checked(text, where)[0], where)

    @classmethod
    def _of(cls, body: dict[str, Any], where: str) -> Manifest:
        """The manifest of a body whose digest was checked, which proves nothing of who wrote it."""
        version = body.pop("format_version", None)
        if not _is_count(version) or not 1 <= version <= FORMAT_VERSION:
            raise RunError(
                f"{where} has format version {version!r}, this reader knows 1 to {FORMAT_VERSION}; "
                "read it with the release that wrote it, or prepare the shards again"
            )
        try:
            shards = tuple(Shard.from_json(shard) for shard in _listed(body, "shards"))
            manifest = cls(**{**body, "shards": shards})
            fault = next(_faults(manifest), None)
        except (KeyError, TypeError, AttributeError) as error:  # keys that lack, or are too many
            raise RunError(f"{where} is no manifest ({one_line(error)}); {_REMEDY}") from error
        if fault is not None:
            raise RunError(f"{where} is no manifest ({fault}); {_REMEDY}")
        return manifest

    def of_language(self, language: str | None) -> tuple[Shard, ...]:
        """The held-out shards of a language; None gives the training shards."""
        return tuple(shard for shard in self.shards if shard.language == language)


_REMEDY = "do not train on it; remove the folder and prepare the shards again"


def _listed(body: Mapping[str, Any], key: str) -> list[Any]:
    items = body[key]
    if not isinstance(items, list):
        raise TypeError(f"{key}={items!r} is no list")
    return items


def _is_count(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _faults(manifest: Manifest) -> Iterator[str]:
    """What no preparation writes, and a reader would stumble over, or be led astray by."""
    counts = {
        "seq_len": (1, 2**31),
        "vocab_size": (1, 2**32),
        "seed": (0, 2**64),
        "rows": (0, 2**63),
        "generation": (1, 2**31),
    }
    for key, (least, most) in counts.items():
        if not _is_count(value := getattr(manifest, key), least, most - 1):
            yield f"{key}={value!r} is no number from {least} to {most - 1}"
    for key in ("settings", "tokenizer", "tokenizer_fingerprint"):
        if not isinstance(value := getattr(manifest, key), str):
            yield f"{key}={value!r} is no text"
    for key in ("special_ids", "heldout_rows", "tokens"):
        value = getattr(manifest, key)
        if not isinstance(value, dict) or not all(map(_is_count, value.values())):
            yield f"{key}={value!r} holds no counts"
    if not isinstance(manifest.special_ids, dict) or not {"cls", "sep", "pad"} <= {
        *manifest.special_ids
    }:
        yield f"special_ids={manifest.special_ids!r} lacks cls, sep or pad"
    for key in ("accounting", "segment_lengths"):
        value = getattr(manifest, key)
        if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
            yield f"{key} is no table"
    if not isinstance(manifest.sources, dict):
        yield "sources is no table"
    names = [shard.name for shard in manifest.shards]
    for shard in manifest.shards:
        yield from _shard_faults(shard)
        if names.count(shard.name) > 1:
            yield f"shards has {shard.name!r} twice"


def _shard_faults(shard: Shard) -> Iterator[str]:
    if not isinstance(shard.name, str) or Path(shard.name).name != shard.name or "\0" in shard.name:
        yield f"shards has the name {shard.name!r}, which is of no file in its folder"
    if not isinstance(shard.sha256, str) or not isinstance(shard.language, str | None):
        yield f"shards: sha256 or language of {shard.name!r} is no text"
    if not _is_count(shard.bytes) or not _is_count(shard.rows):
        yield f"shards: bytes or rows of {shard.name!r} is no number"
        return
    for block in shard.blocks:
        numbers = dataclasses.astuple(block)
        if not all(map(_is_count, numbers)) or block.offset + block.bytes > shard.bytes:
            yield f"shards: a block of {shard.name!r} is not within its {shard.bytes} bytes"


def generation(digest: str) -> str:
    """Where a folder keeps the manifest of that digest once a newer one has taken its place."""
    return f"{EARLIER}/{digest[:16]}.json"


def _checked(text: str, where: str) -> tuple[dict[str, Any], str]:
    """What a manifest says, and its digest of that, which was found right."""
    try:
        body: dict[str, Any] = json.loads(text)
        digest: str = body.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise RunError(f"{where} is damaged ({error}); {_REMEDY}") from error
    if digest != _digest(body):
        raise RunError(f"{where} is damaged: its digest does not match its content; {_REMEDY}")
    return body, digest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of what a tokenizer does, the same for every copy and library version of it.

    It covers the vocabulary, the special ids and the ids of a probe in many scripts (case, accents,
    digits, spacing), not the serialised file, whose fields change between releases.

    Args:
        tokenizer: a transformers tokenizer.
    """
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    behaviour = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {
            name: tokenizer.convert_tokens_to_ids(token) for name, token in specials.items()
        },
        "probe": tokenizer(_PROBE)["input_ids"],
    }
    return hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()


_PROBE = (
    "The Quick brown fox, naïve café №5 ½ ﬁ  12,345.67! Ελληνικά Български русский Türkçe İı "
    "العربية tiếng Việt ภาษาไทย 中文，漢字 हिन्दी Kiswahili اردو "
    "日本語カタカナ 한국어 \U0001f469\u200d\U0001f4bb \t e\u0301"
)


def id_dtype(vocab_size: int) -> npt.DTypeLike:
    """The smallest of the two row types that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write blocks with webdataset's TarWriter: same samples, same bytes, wherever and whenever.

    Args:
        path: final name; the bytes appear there at once, after they are on disk.
        samples: mappings of `__key__`, `input_ids.npy`, `cu_seqlens.npy` (arrays) and `json`.
    """
    import webdataset

    with (
        durable_write(path) as stream,
        webdataset.TarWriter(stream, mtime=0, encoder=_encode) as writer,
    ):
        for sample in samples:
            writer.write(sample)


def _encode(sample: Mapping[str, Any]) -> dict[str, Any]:
    encoded: dict[str, Any] = {"__key__": sample["__key__"]}
    for name, value in sample.items():
        if name.endswith(".npy"):
            stream = io.BytesIO()
            np.lib.format.write_array(stream, value, version=(1, 0), allow_pickle=False)
            encoded[name] = stream.getvalue()
        elif name == "json":
            encoded[name] = json.dumps(value, sort_keys=True).encode()
    return encoded


def describe_tar(path: Path, *, language: str | None = None) -> Shard:
    """Read a finished tar back and describe it for the manifest.

    Raises:
        RunError: it is not a whole tar of blocks.
    """
    blocks = []
    data = path.read_bytes()
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise RunError(f"{path} is damaged ({error}); {_REMEDY}") from error
    for start in range(0, len(members), 3):
        first, last = members[start], members[min(start + 2, len(members) - 1)]
        padded = -(-last.size // _TAR_BLOCK) * _TAR_BLOCK
        raw = data[first.offset : last.offset_data + padded]
        rows = parse_block(raw, where=f"{path}, block {start // 3}")[0].shape[0]
        blocks.append(Block(offset=first.offset, bytes=len(raw), rows=rows, crc32=zlib.crc32(raw)))
    return Shard(
        name=path.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        rows=sum(block.rows for block in blocks),
        language=language,
        blocks=tuple(blocks),
    )


def parse_block(
    raw: bytes, *, where: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], dict[str, Any]]:
    """Decode a block's bytes.

    Returns:
        input_ids [rows, seq_len] (uint16 or uint32), cu_seqlens [segments + 1] (int32) and the
        sample's JSON.

    Raises:
        RunError: the bytes are not a block.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            members = {
                member.name.partition(".")[2]: content.read()
                for member in tar
                if member.isreg() and member.size <= len(raw)  # a sparse one is larger than it is
                if (content := tar.extractfile(member)) is not None
            }
        input_ids, cu_seqlens = (_array(members[f"{name}.npy"]) for name in _ARRAYS)
        meta = json.loads(members["json"])
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError, RecursionError) as error:
        raise RunError(f"{where} is damaged ({one_line(error)}); {_REMEDY}") from error
    if not isinstance(meta, dict):
        raise RunError(f"{where} is damaged (its JSON is no object); {_REMEDY}")
    return input_ids, cu_seqlens, meta


def _array(data: bytes) -> npt.NDArray[Any]:
    """The array of a .npy file, for which no more memory is taken than it has bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"an array of format {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of shape {shape} and {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape).copy()


def publish(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically and durably: from now on the folder is a data set.

    One that is there already stays beside it, for whoever began with it.
    """
    path = folder / MANIFEST
    if path.exists():
        text = path.read_text(encoding="utf-8")
        before = Manifest.from_json(text, where=str(path))
        (folder / EARLIER).mkdir(exist_ok=True)
        write_durably(folder / generation(before.digest), text)
    write_durably(path, manifest.to_json())


def manifests(folder: Path) -> Iterator[Manifest]:
    """All generations' manifests.

    Raises:
        RunError: one is damaged.
    """
    for path in (folder / MANIFEST, *sorted((folder / EARLIER).glob("*.json"))):
        if path.exists():
            yield Manifest.from_json(path.read_text(encoding="utf-8"), where=str(path))


class ShardReader:
    """Checked random access to the blocks of a folder of shards, local or by fsspec URL.

    Several threads may read at once.

    Args:
        url: folder or fsspec URL that holds manifest.json.
        digest: of the manifest to read by, where the folder may have been added to since; None is
            the folder's newest.
        verify: when a block's CRC is checked: the first time that this reader reads it, always,
            or never.
        cache: where blocks are kept and looked for first; None keeps none.

    Raises:
        ConfigError: there is no such manifest there, or no file system for such a URL.
        RunError: the manifest is damaged, or a shard is missing or not of the size it names.
    """

    def __init__(
        self,
        url: str,
        digest: str | None = None,
        *,
        verify: Verify = "first_read",
        cache: BlockCache | None = None,
    ) -> None:
        self.url = url
        self._verify, self._cache = verify, cache
        try:
            self._storage = Storage(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"data.shards={url} is on no file system that fsspec can open ({one_line(error)}); "
                "correct the URL, or install what it asks for"
            ) from error
        self.manifest, self.digest = self._open(digest)
        self._check_sizes()

    @property
    def is_remote(self) -> bool:
        """Whether a read waits for a network rather than for a disk."""
        return self._storage.is_remote

    def _open(self, digest: str | None) -> tuple[Manifest, str]:
        """The folder's manifest, or the older one of that digest."""
        try:
            newest, newest_digest = self._read_manifest(MANIFEST)
        except FileNotFoundError as error:
            raise ConfigError(
                f"data.shards={self.url} has no {MANIFEST}, so it is not a finished preparation; "
                "run `python -m data_prep.build_shards --config RECIPE`, or name another folder"
            ) from error
        if digest is None or digest == newest_digest:
            return newest, newest_digest
        name = generation(digest)
        try:
            older, older_digest = self._read_manifest(name)
        except FileNotFoundError as error:
            raise ConfigError(
                f"data.shards={self.url} holds other shards ({MANIFEST} has digest "
                f"{newest_digest[:16]}) than this run began with ({digest[:16]}), and no {name}; "
                "name the folder that has them, use another output_dir, or pass "
                "--allow_change 'data.shards (content)' to go on with the new ones"
            ) from error
        if older_digest != digest:
            raise RunError(f"{self.url}/{name} is the manifest of {older_digest}; {_REMEDY}")
        return older, older_digest

    def _read_manifest(self, name: str) -> tuple[Manifest, str]:
        where = f"{self.url}/{name}"
        text = self._storage.read(name).decode("utf-8", errors="replace")
        body, digest = _checked(text, where)
        return Manifest._of(body, where), digest

    def _check_sizes(self) -> None:
        shards = self.manifest.shards
        try:
            sizes = self._storage.sizes([shard.name for shard in shards])
        except FileNotFoundError as error:
            raise RunError(f"shard {error} is missing; {_REMEDY}") from error
        for shard in shards:
            size = sizes[shard.name]
            if size is not None and size != shard.bytes:
                raise RunError(
                    f"shard {self.url}/{shard.name} has {size} bytes, the manifest says "
                    f"{shard.bytes}: it was truncated or replaced; {_REMEDY}"
                )

    @functools.cached_property
    def _languages(self) -> dict[str | None, Sequence[tuple[Shard, Block]]]:
        table: dict[str | None, list[tuple[Shard, Block]]] = {}
        for shard in self.manifest.shards:
            table.setdefault(shard.language, []).extend((shard, block) for block in shard.blocks)
        return dict(table)

    @functools.cached_property
    def _is_checked(self) -> dict[str | None, bytearray]:
        """1 for each block whose CRC was found right."""
        return {language: bytearray(len(blocks)) for language, blocks in self._languages.items()}

    def blocks(self, language: str | None = None) -> list[Block]:
        """The training blocks in the manifest's order, or a language's held-out blocks."""
        return [block for _, block in self._languages.get(language, ())]

    def read_block(
        self, index: int, *, language: str | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """One block's input_ids [rows, seq_len] and cu_seqlens [segments + 1].

        Raises:
            RunError: the bytes are not those that were written, or cannot be read.
        """
        input_ids, cu_seqlens, _ = self.read_sample(index, language=language)
        return input_ids, cu_seqlens

    def read_sample(
        self, index: int, *, language: str | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], dict[str, Any]]:
        """As `read_block`, and the block's JSON.

        Raises:
            RunError: the bytes are not those that were written, or cannot be read.
        """
        shard, block = self._languages[language][index]
        is_checked = self._is_checked[language]
        check = self._verify == "always" or (self._verify == "first_read" and not is_checked[index])
        raw = self._read(shard, block, check)
        is_checked[index] |= check
        where = self._name(shard, block)
        sample = parse_block(raw, where=where)
        if check and (fault := _layout_fault(*sample, block, self.manifest)) is not None:
            raise RunError(f"{where} is damaged: {fault}; {_REMEDY}")
        return sample

    def _read(self, shard: Shard, block: Block, check: bool) -> bytes:
        """The block's bytes: as many as it has, and the right ones where they are checked."""
        key = f"{shard.sha256}-{block.offset}"
        if self._cache is not None:
            raw = self._cache.get(key)
            if raw is not None and _fault(raw, block, check) is None:
                return raw
        where = self._name(shard, block)
        span = (block.offset, block.offset + block.bytes)
        try:
            raw = self._storage.read(shard.name, *span, lambda raw: _fault(raw, block, check))
        except FileNotFoundError as error:
            raise RunError(f"{where} cannot be read: the file is missing; {_REMEDY}") from error
        if (fault := _fault(raw, block, check)) is not None:
            raise RunError(f"{where} is damaged: {fault}; {_REMEDY}")
        if self._cache is not None:
            self._cache.put(key, raw)
        return raw

    def _name(self, shard: Shard, block: Block) -> str:
        return f"{self.url}/{shard.name}, block at byte {block.offset}"


def _layout_fault(
    input_ids: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[np.int32],
    meta: Mapping[str, Any],
    block: Block,
    manifest: Manifest,
) -> str | None:
    """What would have kernels look beyond their arrays: a CRC says that bytes are the writer's."""
    if input_ids.shape != (block.rows, manifest.seq_len) or input_ids.dtype.kind != "u":
        return f"its ids are {input_ids.dtype} {input_ids.shape}"
    if input_ids.size and input_ids.max() >= manifest.vocab_size:
        return f"id {input_ids.max()} is outside the vocabulary of {manifest.vocab_size}"
    ends = (0, input_ids.size)
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != np.int32 or cu_seqlens.size < 2:
        return f"its cu_seqlens are {cu_seqlens.dtype} {cu_seqlens.shape}"
    if (cu_seqlens[0], cu_seqlens[-1]) != ends or not (cu_seqlens[1:] > cu_seqlens[:-1]).all():
        return f"its cu_seqlens do not increase from 0 to {input_ids.size}"
    languages = meta.get("segment_languages", [None] * (cu_seqlens.size - 1))
    if not isinstance(languages, list) or len(languages) != cu_seqlens.size - 1:
        return "its JSON's languages are not those of its segments"
    return None


def _fault(raw: bytes, block: Block, check: bool) -> str | None:
    """What is wrong with a block's bytes; the CRC is compared where `check` says so."""
    if len(raw) != block.bytes:
        return f"it has {len(raw)} bytes, the manifest says {block.bytes}"
    if check and zlib.crc32(raw) != block.crc32:
        return "its CRC does not match the manifest"
    return None
