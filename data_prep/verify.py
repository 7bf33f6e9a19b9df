"""`python -m data_prep.verify SHARDS`: every checksum, count and boundary of a folder of shards."""

from __future__ import annotations

import collections
import hashlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import (
    EXIT_FAILED,
    EXIT_FINISHED,
    ConfigError,
    OptionParser,
    RunError,
    run_command,
)
from data_prep.shards import MANIFEST, Manifest, Shard, id_dtype, manifests, parse_block


def main(argv: Sequence[str] | None = None) -> int:
    """Check the folder; exit status 1 and the list of what is broken where anything is."""
    parser = OptionParser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("shards", type=Path, help="folder that holds manifest.json")
    folder: Path = parser.parse_args(argv).shards
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} has no {MANIFEST}, so it is not a finished preparation; run "
            "`python -m data_prep.build_shards --config RECIPE`"
        )
    faults = list(find_faults(folder))
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        print(f"{folder}: {len(faults)} faults", file=sys.stderr)
        return EXIT_FAILED
    print(f"{folder}: everything is as it was written")
    return EXIT_FINISHED


def find_faults(folder: Path) -> Iterator[str]:
    """A line for each thing that is not as the manifest says."""
    where = str(folder / MANIFEST)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
        manifest = Manifest.from_json(text, where=where)
    except (RunError, OSError) as error:
        yield str(error)
        return
    rows: collections.Counter[str | None] = collections.Counter()
    tokens: collections.Counter[str] = collections.Counter()
    for shard in manifest.shards:
        rows[shard.language] += shard.rows
        yield from _shard_faults(folder, shard, manifest, tokens)
    if rows.pop(None, 0) != manifest.rows or dict(rows) != {
        language: n for language, n in manifest.heldout_rows.items() if n
    }:
        yield f"{where}: the shards' rows do not add up to its rows and heldout_rows"
    if dict(tokens) != manifest.tokens:
        yield f"{where}: the blocks' tokens do not add up to its tokens"
    named = {shard.name for generation in manifests(folder) for shard in generation.shards}
    for path in sorted(folder.glob("*.tar*")):
        if path.name not in named:
            yield f"{path}: not in the manifest, but whoever reads *.tar would read it"


def _shard_faults(
    folder: Path, shard: Shard, manifest: Manifest, tokens: collections.Counter[str]
) -> Iterator[str]:
    path = folder / shard.name
    if Path(shard.name).name != shard.name:
        yield f"{path}: a shard must lie in the manifest's folder"
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    if len(data) != shard.bytes:
        yield f"{path}: {len(data)} bytes, the manifest says {shard.bytes}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield f"{path}: its sha256 is not the manifest's"
    if sum(block.rows for block in shard.blocks) != shard.rows:
        yield f"{path}: its blocks' rows do not add up to {shard.rows}"
    ends = np.cumsum([0, *(block.bytes for block in shard.blocks)])
    if [block.offset for block in shard.blocks] != ends[:-1].tolist():
        yield f"{path}: its blocks do not lie end to end"
    for number, block in enumerate(shard.blocks):
        where = f"{path}, block {number} at byte {block.offset}"
        raw = data[block.offset : block.offset + block.bytes]
        if zlib.crc32(raw) != block.crc32:
            yield f"{where}: its CRC is not the manifest's"
            continue
        try:
            input_ids, cu_seqlens, meta = parse_block(raw, where=where)
        except RunError as error:
            yield str(error)
            continue
        for fault in _block_faults(input_ids, cu_seqlens, meta, manifest):
            yield f"{where}: {fault}"
        if input_ids.shape != (block.rows, manifest.seq_len):
            yield f"{where}: shape {input_ids.shape}, not {(block.rows, manifest.seq_len)}"
        if shard.language is None:
            tokens.update(meta["tokens"])


def _block_faults(
    input_ids: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[np.int32],
    meta: dict[str, Any],
    manifest: Manifest,
) -> Iterator[str]:
    if input_ids.dtype != id_dtype(manifest.vocab_size):
        yield f"ids are {input_ids.dtype}, not {id_dtype(manifest.vocab_size)}"
    if input_ids.size and input_ids.max() >= manifest.vocab_size:
        yield f"id {input_ids.max()} is outside the vocabulary of {manifest.vocab_size}"
    bounds = cu_seqlens.astype(np.int64)
    ends = (0, input_ids.size)
    if cu_seqlens.dtype != np.int32 or bounds.size < 2 or (bounds[0], bounds[-1]) != ends:
        yield f"cu_seqlens is not int32 from 0 to {input_ids.size}"
        return
    if not (np.diff(bounds) > 0).all():
        yield "cu_seqlens is not strictly increasing"
        return
    if not np.isin(np.arange(0, input_ids.size, manifest.seq_len), bounds).all():
        yield "a segment crosses the end of a row"
    flat, special = input_ids.reshape(-1), manifest.special_ids
    starts, lasts = flat[bounds[:-1]], flat[bounds[1:] - 1]
    padding = starts == special["pad"]
    if not (padding | ((starts == special["cls"]) & (lasts == special["sep"]))).all():
        yield "a segment is neither framed by the tokenizer's special tokens nor padding"
    num_padding = int(np.diff(bounds)[padding].sum())
    if (num_padding, input_ids.size) != (
        meta["padding"],
        sum(meta["tokens"].values()) + num_padding,
    ):
        yield "its JSON miscounts tokens or padding"
    if "segment_languages" in meta:  # older releases did not write it
        languages, lengths = meta["segment_languages"], np.diff(bounds).tolist()
        tokens: collections.Counter[str | None] = collections.Counter()
        for language, length in zip(languages, lengths, strict=False):
            tokens[language] += length
        expected = {None: num_padding, **meta["tokens"]}
        if len(languages) != len(lengths) or tokens != collections.Counter(expected):
            yield "its JSON's languages of segments do not add up to its tokens"
    if meta["rows"] != input_ids.shape[0]:
        yield f"its JSON says {meta['rows']} rows, not {input_ids.shape[0]}"


if __name__ == "__main__":
    run_command(main)
