"""Records that change hands on disk: written by one kind of work, read by another.

A source writes one file, in runs of bounded size. Within a run the records are grouped by
partition, so that a partition reads one slice of every run, whatever the corpus's size. This is how
documents come to lie in the order of their digests without anybody ever holding them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.container import Container, ContainerWriter

KEY = [("hi", "<u8"), ("lo", "<u8")]  # a document's digest; its high bits are its partition


def partition_of(hashes: npt.NDArray[np.uint64], num_partitions: int) -> npt.NDArray[np.int64]:
    """The partition of each hash, a power of two in number: its highest bits."""
    bits = num_partitions.bit_length() - 1
    if not bits:
        return np.zeros(len(hashes), dtype=np.int64)
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def write_run(
    writer: ContainerWriter,
    records: npt.NDArray[np.void],
    partitions: npt.NDArray[np.int64],
    num_partitions: int,
    payloads: Sequence[bytes] | None = None,
) -> None:
    """Add a run to a source's file.

    Args:
        writer: of the file.
        records: [n], of any structured dtype; with a field `bytes` where there are payloads.
        partitions: [n], who is to read each.
        num_partitions: of which there are as many.
        payloads: [n] bytes that travel with the records.
    """
    run = writer.facts.setdefault("runs", 0)
    writer.facts["runs"] = run + 1
    order = np.argsort(partitions, kind="stable")
    bounds = np.searchsorted(partitions[order], np.arange(num_partitions + 1))
    writer.append(f"bounds/{run}", bounds.astype("<u4"))
    writer.append(f"records/{run}", records[order])
    if payloads is not None:
        ends = np.concatenate([[0], np.cumsum(records["bytes"][order], dtype=np.int64)])
        writer.append(f"payload_bounds/{run}", ends[bounds])
        joined = b"".join([payloads[i] for i in order.tolist()])
        writer.append(f"payload/{run}", np.frombuffer(joined, dtype=np.uint8))


def read_partition(
    paths: Iterable[Path], partition: int, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[np.void], bytes]:
    """All records of a partition with their payloads end to end, in the order of the sources."""
    records, payloads = [np.zeros(0, dtype)], []
    for container, run in _runs(paths):
        start, stop = container.read(f"bounds/{run}", partition, partition + 2).tolist()
        if start == stop:
            continue
        records.append(container.read(f"records/{run}", start, stop))
        if f"payload/{run}" in container:
            edges = container.read(f"payload_bounds/{run}", partition, partition + 2).tolist()
            payloads.append(container.read(f"payload/{run}", *edges).tobytes())
    return np.concatenate(records), b"".join(payloads)


def _runs(paths: Iterable[Path]) -> Iterator[tuple[Container, int]]:
    for path in paths:
        container = Container(path)
        for run in range(container.facts.get("runs", 0)):
            yield container, run


def is_among(keys: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[n] whether each key (fields hi and lo) is one of `others`, which are sorted by hi and lo."""
    found = np.zeros(len(keys), dtype=bool)
    if not len(others):
        return found
    at = np.searchsorted(others["hi"], keys["hi"])
    # Equal high halves of different digests are rare: each step looks at the next of them.
    while True:
        inside = at < len(others)
        same = inside.copy()
        same[inside] = others["hi"][at[inside]] == keys["hi"][inside]
        if not same.any():
            return found
        found[same] |= others["lo"][at[same]] == keys["lo"][same]
        at = np.where(same, at + 1, len(others))
