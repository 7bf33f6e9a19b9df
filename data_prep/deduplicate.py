"""What goes because it stands elsewhere: near duplicates, and lines of other documents.

Whatever two documents share is a number: a band of a MinHash signature, or the hash of a line.
These numbers are exchanged so that equal ones meet; of all documents that have one, the first in
the order of digests keeps its place. The verdicts go back to the documents' partitions. All of it
is a function of the texts alone, and no rank holds more than a partition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.container import write_container
from data_prep.exchange import KEY, partition_of, read_partition, write_run
from data_prep.similar import line_hashes, near_duplicate_bands
from data_prep.spill import Counts, Spills
from data_prep.tokens import LINE, UniqueDocuments, unique_documents

SHARED = np.dtype([("shared", "<u8"), *LINE.descr])
BATCH = 1024  # documents whose signatures are computed together

Stage = Callable[[str, Callable[[int], None]], None]  # does work(i) for every partition


def similar_documents(
    spills: Spills, work: Path, num_partitions: int, threshold: float, stage: Stage
) -> list[Path]:
    """Files that tell each partition which documents are near duplicates of an earlier one.

    Args:
        spills: the documents.
        work: folder for the files.
        num_partitions: of the documents, and of the numbers.
        threshold: Jaccard index from which documents are alike.
        stage: does a piece of work for every partition.
    """

    def bands(documents: UniqueDocuments) -> npt.NDArray[np.void]:
        tables = [np.zeros(0, SHARED)]
        number = len(documents.records)
        for start in range(0, number, BATCH):
            rows = range(start, min(start + BATCH, number))
            found = near_duplicate_bands([documents.text(i) for i in rows], threshold)
            table = np.zeros(found.shape, SHARED)
            table["shared"] = found
            for name in ("hi", "lo"):
                table[name] = documents.records[name][rows.start : rows.stop, None]
            tables.append(table.reshape(-1))
        return np.concatenate(tables)

    return _exchange("similar", spills, work, num_partitions, bands, KEY, stage)


def repeated_lines(spills: Spills, work: Path, num_partitions: int, stage: Stage) -> list[Path]:
    """Files that tell each partition which lines of its documents stand in an earlier place.

    Args:
        spills: the documents.
        work: folder for the files.
        num_partitions: of the documents, and of the numbers.
        stage: does a piece of work for every partition.
    """

    def lines(documents: UniqueDocuments) -> npt.NDArray[np.void]:
        tables = [np.zeros(0, SHARED)]
        for index, record in enumerate(documents.records):
            hashes = line_hashes(documents.text(index))
            counted = np.flatnonzero(hashes)  # 0 stands for a line too short to count
            table = np.zeros(len(counted), SHARED)
            table["shared"], table["line"] = hashes[counted], counted
            table["hi"], table["lo"] = record["hi"], record["lo"]
            tables.append(table)
        return np.concatenate(tables)

    return _exchange("lines", spills, work, num_partitions, lines, LINE, stage)


def _exchange(
    name: str,
    spills: Spills,
    work: Path,
    num_partitions: int,
    describe: Callable[[UniqueDocuments], npt.NDArray[np.void]],
    verdict: Any,
    stage: Stage,
) -> list[Path]:
    """Send each partition's numbers to where equal ones meet, and the verdicts back."""
    sent = [work / f"{name}-sent-{partition:06d}" for partition in range(num_partitions)]
    back = [work / f"{name}-back-{partition:06d}" for partition in range(num_partitions)]

    def send(partition: int) -> None:
        if not sent[partition].exists():
            table = describe(unique_documents(spills, partition, Counts()))
            with write_container(sent[partition]) as writer:
                places = partition_of(table["shared"], num_partitions)
                write_run(writer, table, places, num_partitions)

    def judge(partition: int) -> None:
        if not back[partition].exists():
            table, _ = read_partition(sent, partition, SHARED)
            table = np.sort(_met(table), order=["shared", "hi", "lo", "line"])
            again = np.zeros(len(table), dtype=bool)
            again[1:] = table["shared"][1:] == table["shared"][:-1]
            goes = np.unique(table[again][list(np.dtype(verdict).names or ())].astype(verdict))
            with write_container(back[partition]) as writer:
                write_run(writer, goes, partition_of(goes["hi"], num_partitions), num_partitions)

    stage(f"{name}-compare", send)
    stage(f"{name}-judge", judge)
    return back


def _met(table: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """SHARED records whose number another one has too: few, so that they alone are sorted whole."""
    order = np.argsort(table["shared"])
    same = np.diff(table["shared"][order]) == 0
    met = np.zeros(len(table), dtype=bool)
    met[1:] |= same
    met[:-1] |= same
    chosen: npt.NDArray[np.void] = table[order[met]]
    return chosen
