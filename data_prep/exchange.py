"""Records that change hands on disk: written by one kind of work, read by another.

A source writes one file, in runs of bounded size. Within a run the records are grouped by
partition, so that a partition reads one slice of every run, whatever the corpus's size. This is how
documents come to lie in the order of their digests without anybody ever holding them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.container import Container, ContainerWriter

MERGED_AT_ONCE = 64 << 20
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


def merge_runs(
    writer: ContainerWriter,
    sources: Sequence[Container],
    relabel: Callable[[int, npt.NDArray[np.void]], npt.NDArray[np.void]],
) -> None:
    """Write the runs of several sources, with payloads, as one run of records in the same order.

    What a partition reads then lies in one place. Each source is read from front to back, about
    MERGED_AT_ONCE bytes of all of them at a time.

    Args:
        writer: of the new file.
        sources: files with payloads.
        relabel: what becomes of the records of the source with an index.
    """
    runs = [(i, c, run) for i, c in enumerate(sources) for run in range(c.facts.get("runs", 0))]
    writer.facts["runs"] = int(bool(runs))
    if not runs:
        return

    def pieces(name: str, edges: npt.NDArray[np.int64]) -> Iterator[list[list[Any]]]:
        """What each run has of some partitions, and then of the next ones; [partitions][runs]."""
        before, first, last = edges.sum(0), 0, edges.shape[1] - 1
        # a record has 64 bytes at most
        at_once = MERGED_AT_ONCE // (1 if name == "payload" else 64)
        while first < last:
            stop = int(np.searchsorted(before, before[first] + at_once, side="right")) - 1
            stop = min(max(stop, first + 1), last)
            found = []
            for (index, container, run), row in zip(runs, edges, strict=True):
                part = container.read(f"{name}/{run}", int(row[first]), int(row[stop]))
                part = part if name == "payload" else relabel(index, part)
                found.append(np.split(part, row[first + 1 : stop] - row[first]))
            yield [list(of_partition) for of_partition in zip(*found, strict=True)]
            first = stop

    def edges(name: str) -> npt.NDArray[np.int64]:
        return np.stack([c.read(f"{name}/{run}") for _, c, run in runs]).astype(np.int64)

    def copy(name: str, found: npt.NDArray[np.int64]) -> None:
        for block in pieces(name, found):
            for of_partition in block:
                writer.append(f"{name}/0", np.concatenate(of_partition))

    bounds, payload_bounds = edges("bounds"), edges("payload_bounds")
    writer.append("bounds/0", bounds.sum(0).astype("<u4"))
    copy("records", bounds)
    writer.append("payload_bounds/0", payload_bounds.sum(0))
    copy("payload", payload_bounds)


def read_partition(
    sources: Iterable[Path | Container], partition: int, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[np.void], bytes]:
    """All records of a partition with their payloads end to end, in the order of the sources."""
    records, payloads = [np.zeros(0, dtype)], []
    for container, run in _runs(sources):
        start, stop = container.read(f"bounds/{run}", partition, partition + 2).tolist()
        if start == stop:
            continue
        records.append(container.read(f"records/{run}", start, stop))
        if f"payload/{run}" in container:
            edges = container.read(f"payload_bounds/{run}", partition, partition + 2).tolist()
            payloads.append(container.read(f"payload/{run}", *edges).tobytes())
    return np.concatenate(records), b"".join(payloads)


def _runs(sources: Iterable[Path | Container]) -> Iterator[tuple[Container, int]]:
    for source in sources:
        container = source if isinstance(source, Container) else Container(source)
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
