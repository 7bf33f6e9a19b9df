"""Tokens per second that the loader gives a rank, on one core, every check and the disk included.

    python benchmarks/loader.py [--tokens 12000000] [--json]

Writes shards of random ids with the project's own writer and reads each row once, in the order of
training. The process keeps to one core, so the thread that reads ahead takes the time that it
saves elsewhere. The files leave the page cache before each pass. `webdataset` is the same shards
read by `WebDataset(...).decode()` alone, which neither checks, nor shuffles, nor makes batches.
`remote` is a file system in memory whose every read takes --latency seconds, as object storage's
do; `remote, one by one` reads it as if it were local, one step ahead.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fsspec
import numpy as np
import numpy.typing as npt
import torch
import webdataset
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.harness import arguments, cpu_seconds, interleaved, report
from data_prep.pack import best_fit
from data_prep.shards import Manifest, Shard, ShardReader, describe_tar, publish, write_tar
from pipeline.loader import Loader
from pipeline.topology import Topology

TARGET = 3e6  # tokens a second
CLS, PAD, SEP = 0, 1, 2
MEDIAN, MEAN = 59, 86  # tokens of a segment, before it is cut to the row
WINDOW = 1 << 16  # segments packed together, as in a preparation
ROWS_PER_BLOCK, BLOCKS_PER_SHARD = 256, 64
SHAPES = [(256, 8), (256, 32), (512, 8), (512, 32)]  # row, rows of a micro-batch
MICRO_STEPS = 8


def main() -> None:
    """Write the shards, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="of each set of shards")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each case")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds of a remote read")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.tokens, options.repeats, options.latency)
    slowest = min(row["tokens/s"] for row in rows if row["reader"] == "loader")
    ratio = (f"slowest loader case, tokens/s / {TARGET:,.0f}", slowest / TARGET)
    report("loader", rows, ratio, options, cores=1, rows_per_block=ROWS_PER_BLOCK)


def measure(folder: Path, tokens: int, repeats: int, latency: float) -> list[dict[str, Any]]:
    """A row of the table for each kind of id, shape and reader."""
    cases: dict[tuple[str, str, int, int | str], Callable[[], int]] = {}
    for dtype in (np.uint16, np.uint32):
        for seq_len in sorted({seq_len for seq_len, _ in SHAPES}):
            name = dtype.__name__
            shards = folder / f"{name}-{seq_len}"
            write_shards(shards, tokens, seq_len, dtype)
            for micro in [micro for length, micro in SHAPES if length == seq_len]:
                cases["loader", name, seq_len, micro] = functools.partial(
                    read_epoch, str(shards), micro
                )
            cases["webdataset", name, seq_len, "-"] = functools.partial(read_alone, shards)
    url = copy_far(shards, latency)
    for reader, is_far in (("remote", True), ("remote, one by one", False)):
        cases[reader, name, seq_len, micro] = functools.partial(read_epoch, url, micro, is_far)
    cpu: dict[Any, list[float]] = collections.defaultdict(list)
    counts: dict[Any, int] = {}

    def count(case: Any) -> None:
        drop_page_cache(folder)
        started = cpu_seconds()
        counts[case] = cases[case]()
        cpu[case].append(cpu_seconds() - started)

    timed = {str(case): functools.partial(count, case) for case in cases}
    seconds = interleaved(timed, repeats=repeats)
    return [
        {
            "reader": case[0],
            "ids": case[1],
            "row": case[2],
            "micro-batch": case[3],
            "tokens": counts[case],
            "tokens/s": counts[case] / seconds[str(case)],
            "tokens/CPU s": counts[case] / float(np.median(cpu[case][1:])),
        }
        for case in cases
    ]


def read_epoch(shards: str, micro: int, is_far: bool = False) -> int:
    """All tokens of the whole steps of an epoch, by a loader that has read nothing yet."""
    one_rank = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1)
    batch_size = micro * MICRO_STEPS
    reader = ShardReader(shards)
    reader._storage.is_remote = is_far
    loader = Loader(reader, one_rank, batch_size=batch_size, micro=micro, seed=1)
    return sum(
        batch.num_tokens
        for step in range(reader.manifest.rows // batch_size)
        for batch in loader.micro_batches(step)
    )


class FarFileSystem(MemoryFileSystem):
    """Memory that takes its time for every read."""

    protocol = "far"
    latency = 0.0

    def cat_file(self, path: str, **options: Any) -> bytes:
        """As the base class does, later."""
        time.sleep(self.latency)
        data: bytes = super().cat_file(path, **options)
        return data


def copy_far(shards: Path, latency: float) -> str:
    """The URL of a copy of the shards whose reads take `latency` seconds."""
    fsspec.register_implementation("far", FarFileSystem, clobber=True)
    FarFileSystem.latency = latency
    url = "far://shards"
    for path in shards.iterdir():
        fsspec.filesystem("far").pipe_file(f"{url}/{path.name}", path.read_bytes())
    return url


def read_alone(shards: Path) -> int:
    """All tokens, padding included, of decoded samples."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return sum(sample["input_ids.npy"].size for sample in dataset)


def drop_page_cache(folder: Path) -> None:
    """Let the next read of the shards come from the disk."""
    for path in folder.glob("*/*.tar"):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_shards(folder: Path, tokens: int, seq_len: int, dtype: type[np.generic]) -> None:
    """Shards of random ids whose segments are as long as those of web text."""
    folder.mkdir()
    vocab_size = 64_000 if dtype == np.uint16 else 250_002
    samples = _samples(tokens // (seq_len * ROWS_PER_BLOCK), seq_len, vocab_size, dtype)
    shards: list[Shard] = []
    while blocks := list(itertools.islice(samples, BLOCKS_PER_SHARD)):
        path = folder / f"train-{len(shards):06d}.tar"
        write_tar(path, blocks)
        shards.append(describe_tar(path))
    manifest = Manifest(
        settings="benchmark",
        seq_len=seq_len,
        vocab_size=vocab_size,
        tokenizer_fingerprint="none",
        special_ids={"cls": CLS, "sep": SEP, "pad": PAD},
        seed=1,
        rows=sum(shard.rows for shard in shards),
        heldout_rows={},
        tokens={},
        accounting={},
        shards=tuple(shards),
    )
    publish(folder, manifest)


def _samples(
    num_blocks: int, seq_len: int, vocab_size: int, dtype: type[np.generic]
) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(1)
    rows: list[list[int]] = []
    for number in range(num_blocks):
        if len(rows) < ROWS_PER_BLOCK:
            rows += _packed_rows(rng, seq_len)
        block, rows = rows[:ROWS_PER_BLOCK], rows[ROWS_PER_BLOCK:]
        padded = [[*row, seq_len - sum(row)] if sum(row) < seq_len else row for row in block]
        bounds = np.cumsum([0, *(length for row in padded for length in row)])
        ids = rng.integers(3, vocab_size, ROWS_PER_BLOCK * seq_len).astype(dtype)
        ids[bounds[:-1]], ids[bounds[1:] - 1] = CLS, SEP
        for index, row in enumerate(block):
            ids[index * seq_len + sum(row) : (index + 1) * seq_len] = PAD
        yield {
            "__key__": f"train-{number:08d}",
            "input_ids.npy": ids.reshape(ROWS_PER_BLOCK, seq_len),
            "cu_seqlens.npy": bounds.astype(np.int32),
            "json": {"rows": ROWS_PER_BLOCK},
        }


def _packed_rows(rng: np.random.Generator, seq_len: int) -> list[list[int]]:
    """Segment lengths of full rows, in random order."""
    sigma = np.sqrt(2 * np.log(MEAN / MEDIAN))
    drawn = np.round(rng.lognormal(np.log(MEDIAN), sigma, WINDOW))
    lengths: npt.NDArray[np.int64] = np.clip(drawn, 3, seq_len).astype(np.int64)
    packed = best_fit(lengths.tolist(), seq_len)
    rows = [lengths[row].tolist() for row in packed]
    fill = lengths.sum() / (len(rows) * seq_len)
    assert fill >= 0.995, fill
    return [rows[index] for index in rng.permutation(len(rows))]


if __name__ == "__main__":
    main()
