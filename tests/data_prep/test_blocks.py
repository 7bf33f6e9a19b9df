from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.blocks import RowFiles, block_sample
from data_prep.container import write_container
from data_prep.plan import Rows

SEQ_LEN = 16


class Ids:
    """Partitions' ids in memory: no two are equal, so that each says where it is from."""

    def __init__(self, num_partitions: int = 3, size: int = 100) -> None:
        self.languages = ["de", "en", "sw"]
        self._ids = (100 + np.arange(num_partitions * size, dtype=np.uint16)).reshape(-1, size)

    def tokens(self, partition: int) -> np.ndarray:
        return self._ids[partition]


segment = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 14), st.integers(0, 86))


@st.composite
def some_rows(draw: st.DrawFn) -> list[list[tuple[int, int, int, int]]]:
    """Rows of (partition, language, length, offset) that are at most full."""
    rows = []
    for found in draw(st.lists(st.lists(segment, min_size=1, max_size=5), min_size=1, max_size=6)):
        row, free = [], SEQ_LEN
        for partition, language, length, offset in found:
            length = min(length, free - 2)
            if length > 0:
                row.append((partition, language, length, offset))
                free -= length + 2
        rows.append(row)
    return rows


def naive_block(rows: list[list[tuple[int, int, int, int]]], ids: Ids, letters: Any) -> Any:
    """Rows, boundaries, languages and counts, segment after segment."""
    flat: list[int] = []
    cu_seqlens, names, tokens = [0], [], dict[str, int]()
    padding = 0
    for row in rows:
        end = len(flat) + SEQ_LEN
        for partition, language, length, offset in row:
            content = ids.tokens(partition)[offset : offset + length].tolist()
            flat += [letters.cls_id, *content, letters.sep_id]
            cu_seqlens.append(len(flat))
            name = ids.languages[language]
            names.append(name)
            tokens[name] = tokens.get(name, 0) + length + 2
        if len(flat) < end:
            padding += end - len(flat)
            flat += [letters.pad_id] * (end - len(flat))
            cu_seqlens.append(end)
            names.append(None)
    return flat, cu_seqlens, names, tokens, padding


@given(some_rows())
def test_a_block_is_what_writing_segment_after_segment_gives(
    letters: Any, rows: list[list[tuple[int, int, int, int]]]
) -> None:
    ids = Ids()
    sample = block_sample("train-000000-00000000", Rows.of(rows), ids, letters, SEQ_LEN)
    flat, cu_seqlens, names, tokens, padding = naive_block(rows, ids, letters)
    assert sample["__key__"] == "train-000000-00000000"
    assert sample["input_ids.npy"].shape == (len(rows), SEQ_LEN)
    assert sample["input_ids.npy"].dtype == letters.dtype
    assert sample["input_ids.npy"].reshape(-1).tolist() == flat
    assert sample["cu_seqlens.npy"].dtype == np.int32
    assert sample["cu_seqlens.npy"].tolist() == cu_seqlens
    assert sample["json"] == {
        "rows": len(rows),
        "tokens": tokens,
        "padding": padding,
        "segment_languages": names,
    }


@settings(max_examples=50)
@given(st.lists(some_rows() | st.just([]), min_size=1, max_size=4), st.data())
def test_slices_go_over_the_bounds_of_files(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[list[tuple[int, int, int, int]]]],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    paths = [folder / str(number) for number in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        with write_container(path) as writer:
            Rows.of(rows).write(writer)
    together = [row for rows in files for row in rows]
    found = RowFiles(paths)
    assert len(found) == len(together)
    if together:
        start = data.draw(st.integers(0, len(together) - 1))
        stop = data.draw(st.integers(start + 1, len(together)))
        part = found.slice(start, stop)
        assert [part[row].tolist() for row in range(len(part))] == together[start:stop]


def test_no_files_are_no_rows(tmp_path: Path) -> None:
    assert len(RowFiles([])) == 0
