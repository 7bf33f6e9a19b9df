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
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError, RunError, one_line
from data_prep.durable import durable_write, write_durably

FORMAT_VERSION = 2  # 1 had no generations, sources and segment lengths; it is still read
MANIFEST = "manifest.json"
EARLIER = "manifests"  # folder of the manifests of earlier generations, by the digests' heads
_TAR_BLOCK = 512


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
        return cls(**{**body, "blocks": tuple(Block(**block) for block in body["blocks"])})


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
        try:
            body: dict[str, Any] = json.loads(text)
            digest = body.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunError(f"{where} is damaged ({error}); {_REMEDY}") from error
        if digest != _digest(body):
            raise RunError(f"{where} is damaged: its digest does not match its content; {_REMEDY}")
        if not 1 <= (version := body.pop("format_version")) <= FORMAT_VERSION:
            raise RunError(
                f"{where} has format version {version}, this reader knows 1 to {FORMAT_VERSION}; "
                "read it with the release that wrote it, or prepare the shards again"
            )
        shards = tuple(Shard.from_json(shard) for shard in body.pop("shards"))
        return cls(**body, shards=shards)

    def of_language(self, language: str | None) -> tuple[Shard, ...]:
        """The held-out shards of a language; None gives the training shards."""
        return tuple(shard for shard in self.shards if shard.language == language)


_REMEDY = "do not train on it; remove the folder and prepare the shards again"


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
                if (content := tar.extractfile(member)) is not None
            }
        input_ids = np.load(io.BytesIO(members["input_ids.npy"]), allow_pickle=False)
        cu_seqlens = np.load(io.BytesIO(members["cu_seqlens.npy"]), allow_pickle=False)
        meta = json.loads(members["json"])
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        raise RunError(f"{where} is damaged ({error}); {_REMEDY}") from error
    return input_ids, cu_seqlens, meta


def publish(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically and durably: from now on the folder is a data set.

    One that is there already stays beside it, for whoever began with it.
    """
    path = folder / MANIFEST
    if path.exists():
        text = path.read_text(encoding="utf-8")
        before = Manifest.from_json(text, where=str(path))
        (folder / EARLIER).mkdir(exist_ok=True)
        write_durably(folder / earlier_manifest(before.digest), text)
    write_durably(path, manifest.to_json())


def earlier_manifest(digest: str) -> str:
    """Where an earlier generation's manifest lies in the folder of shards."""
    return f"{EARLIER}/{digest[:16]}.json"


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

    Args:
        url: folder or fsspec URL that holds manifest.json.

    Raises:
        ConfigError: there is no manifest there, or no file system for such a URL.
        RunError: the manifest is damaged, or a shard is missing or not of the size it names.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"data.shards={url} is on no file system that fsspec can open ({one_line(error)}); "
                "correct the URL, or install what it asks for"
            ) from error
        manifest_path = f"{self._root.rstrip('/')}/{MANIFEST}"
        try:
            text = self._fs.cat_file(manifest_path).decode("utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(
                f"data.shards={url} has no {MANIFEST}, so it is not a finished preparation; run "
                "`python -m data_prep.build_shards --config RECIPE`, or name another folder"
            ) from error
        except OSError as error:
            raise RunError(f"{url}/{MANIFEST} cannot be read ({one_line(error)})") from error
        self.manifest = Manifest.from_json(text, where=f"{url}/{MANIFEST}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        for shard in self.manifest.shards:
            try:
                size = self._fs.size(self._path(shard))
            except FileNotFoundError as error:
                raise RunError(f"shard {self.url}/{shard.name} is missing; {_REMEDY}") from error
            if size != shard.bytes:
                raise RunError(
                    f"shard {self.url}/{shard.name} has {size} bytes, the manifest says "
                    f"{shard.bytes}: it was truncated or replaced; {_REMEDY}"
                )

    def _path(self, shard: Shard) -> str:
        return f"{self._root.rstrip('/')}/{shard.name}"

    @functools.cached_property
    def _languages(self) -> dict[str | None, Sequence[tuple[Shard, Block]]]:
        table: dict[str | None, list[tuple[Shard, Block]]] = {}
        for shard in self.manifest.shards:
            table.setdefault(shard.language, []).extend((shard, block) for block in shard.blocks)
        return dict(table)

    def blocks(self, language: str | None = None) -> list[Block]:
        """The training blocks in the manifest's order, or a language's held-out blocks."""
        return [block for _, block in self._languages.get(language, ())]

    def read_block(
        self, index: int, *, language: str | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """One block's input_ids [rows, seq_len] and cu_seqlens [segments + 1].

        Raises:
            RunError: the bytes are not those that were written.
        """
        input_ids, cu_seqlens, _ = self.read_sample(index, language=language)
        return input_ids, cu_seqlens

    def read_sample(
        self, index: int, *, language: str | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], dict[str, Any]]:
        """As `read_block`, and the block's JSON.

        Raises:
            RunError: the bytes are not those that were written.
        """
        shard, block = self._languages[language][index]
        where = f"{self.url}/{shard.name}, block at byte {block.offset}"
        end = block.offset + block.bytes
        try:
            raw = self._fs.cat_file(self._path(shard), start=block.offset, end=end)
        except OSError as error:
            raise RunError(f"{where} cannot be read ({one_line(error)}); {_REMEDY}") from error
        if zlib.crc32(raw) != block.crc32:
            raise RunError(f"{where} is damaged: its CRC does not match the manifest; {_REMEDY}")
        return parse_block(raw, where=where)
