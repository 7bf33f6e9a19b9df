from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.container import ContainerWriter
from data_prep.exchange import KEY, is_among, partition_of, read_partition, write_run

RECORD = np.dtype([*KEY, ("bytes", "<u4")])
# Small numbers in the highest and lowest bits, so that keys are equal, neighbours and far apart.
hashes = st.tuples(st.integers(0, 7), st.integers(0, 3)).map(lambda x: (x[0] << 61) + x[1])
record = st.tuples(hashes, st.integers(0, 2**64 - 1), st.binary(max_size=6))
sources = st.lists(st.lists(st.lists(record, max_size=6), max_size=3), max_size=3)
powers = st.sampled_from([1, 2, 8, 64])
Source = Sequence[Sequence[tuple[int, int, bytes]]]  # runs of records


def write(folder: Path, found: Sequence[Source], number: int, *, payloads: bool) -> list[Path]:
    paths = []
    for index, runs in enumerate(found):
        paths.append(folder / str(index))
        with open(paths[-1], "wb") as stream:
            writer = ContainerWriter(stream)
            for run in runs:
                table = np.array([(hi, lo, len(text)) for hi, lo, text in run], dtype=RECORD)
                texts = [text for _, _, text in run] if payloads else None
                write_run(writer, table, partition_of(table["hi"], number), number, texts)
            writer.finish()
    return paths


@given(st.lists(hashes), st.sampled_from([1, 2, 4, 64, 1 << 16]))
def test_a_partition_is_the_highest_bits(found: list[int], number: int) -> None:
    bits = len(f"{number:b}") - 1
    expected = [int(f"{value:064b}"[:bits] or "0", 2) for value in found]
    assert partition_of(np.array(found, dtype="<u8"), number).tolist() == expected


@settings(max_examples=60)
@given(sources, powers)
def test_every_record_is_read_once_with_its_payload_in_the_order_of_sources(
    tmp_path_factory: pytest.TempPathFactory, found: list[Source], number: int
) -> None:
    paths = write(tmp_path_factory.mktemp("exchange"), found, number, payloads=True)
    everything = [item for runs in found for run in runs for item in run]
    total = 0
    for partition in range(number):
        mine = [item for item in everything if item[0] * number >> 64 == partition]
        table, payload = read_partition(paths, partition, RECORD)
        assert table.dtype == RECORD
        assert table[["hi", "lo"]].tolist() == [(hi, lo) for hi, lo, _ in mine]
        ends = np.cumsum(table["bytes"], dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        assert [payload[a:b] for a, b in zip(starts, ends, strict=False)] == [t for *_, t in mine]
        assert len(payload) == sum(len(text) for *_, text in mine)
        total += len(table)
    assert total == len(everything)


@settings(max_examples=30)
@given(sources, powers)
def test_records_travel_without_payloads(
    tmp_path_factory: pytest.TempPathFactory, found: list[Source], number: int
) -> None:
    paths = write(tmp_path_factory.mktemp("exchange"), found, number, payloads=False)
    read: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for partition in range(number):
        table, payload = read_partition(paths, partition, RECORD)
        assert payload == b""
        read.update(table.tolist())
    assert read == collections.Counter(
        (hi, lo, len(text)) for runs in found for run in runs for hi, lo, text in run
    )


few = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=25)


@given(few, few)
def test_is_among_looks_behind_equal_high_halves(
    keys: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    found = is_among(np.array(keys, dtype=KEY), np.sort(np.array(others, dtype=KEY)))
    assert found.tolist() == [key in set(others) for key in keys]


def test_is_among_takes_records_with_more_fields() -> None:
    records = np.array([(1, 2, 0), (2**64 - 1, 2**64 - 1, 0), (1, 3, 0)], dtype=RECORD)
    others = np.array([(1, 3), (2**64 - 1, 2**64 - 1)], dtype=KEY)
    assert is_among(records, others).tolist() == [False, True, True]
