from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import webdataset

from data_prep.command import RunError
from data_prep.shards import Block, ShardReader
from pipeline.loader import Batch, Loader
from pipeline.topology import Topology

SEED = 3
CLS_SEP_PAD = {"shards": (0, 2, 1), "bert_shards": (2, 3, 0)}
each_tokenizer = pytest.mark.parametrize("which", sorted(CLS_SEP_PAD))


class Row(NamedTuple):
    """A row as webdataset alone reads it: its segments, without the padding's."""

    segments: list[list[int]]


def read_rows(folder: Path, pattern: str, cls_sep_pad: tuple[int, int, int]) -> list[Row]:
    return list(_read_rows(folder, pattern, cls_sep_pad))


def _read_rows(folder: Path, pattern: str, cls_sep_pad: tuple[int, int, int]) -> Iterator[Row]:
    cls_id, sep_id, pad_id = cls_sep_pad
    urls = [str(path) for path in sorted(folder.glob(pattern))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        input_ids, boundaries = sample["input_ids.npy"], sample["cu_seqlens.npy"].tolist()
        num_rows, seq_len = input_ids.shape
        rows: list[Row] = [Row([]) for _ in range(num_rows)]
        for start, stop in itertools.pairwise(boundaries):
            segment = input_ids.flatten()[start:stop].tolist()
            if set(segment) == {pad_id}:
                continue
            assert (segment[0], segment[-1]) == (cls_id, sep_id)
            rows[start // seq_len].segments.append(segment)
        yield from rows


def assert_is_rows(batch: Batch, rows: list[Row]) -> None:
    """The batch is exactly these rows' segments, end to end, without padding."""
    segments = [segment for row in rows for segment in row.segments]
    bounds = np.cumsum([0, *map(len, segments)]).tolist()
    assert batch.input_ids.tolist() == [[token for segment in segments for token in segment]]
    assert batch.positions.tolist() == [[i for segment in segments for i in range(len(segment))]]
    assert batch.cu_seqlens.tolist() == bounds
    assert batch.num_tokens == bounds[-1]
    assert (batch.input_ids.dtype, batch.positions.dtype) == (torch.int64, torch.int64)
    assert batch.cu_seqlens.dtype == torch.int32


@pytest.fixture
def folder(which: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(which)


@pytest.fixture
def train_rows(folder: Path, which: str) -> list[Row]:
    return read_rows(folder, "train-*.tar", CLS_SEP_PAD[which])


def make_loader(
    folder: Path, rank: int = 0, world_size: int = 1, batch_size: int = 8, micro: int = 2
) -> Loader:
    topology = Topology(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size
    )
    reader = ShardReader(str(folder))
    return Loader(reader, topology, batch_size=batch_size, micro=micro, seed=SEED)


def step_rows(folder: Path, step: int, world_size: int) -> list[int]:
    """Row ids of a step, rank by rank."""
    return [
        row
        for rank in range(world_size)
        for batch in make_loader(folder, rank, world_size).micro_batches(step)
        for row in batch.row_ids
    ]


@each_tokenizer
def test_the_prepared_text_is_worth_testing_with(
    folder: Path, train_rows: list[Row], which: str
) -> None:
    """Several tars, several blocks, a short last block, padding, several segments a row."""
    manifest = ShardReader(str(folder)).manifest
    blocks = ShardReader(str(folder)).blocks()
    assert len(list(folder.glob("train-*.tar"))) > 2
    assert 0 < blocks[-1].rows < blocks[0].rows
    assert manifest.rows == len(train_rows) > 60
    assert manifest.special_ids["pad"] == CLS_SEP_PAD[which][2]
    lengths = [sum(map(len, row.segments)) for row in train_rows]
    assert min(lengths) < max(lengths) == manifest.seq_len
    assert max(len(row.segments) for row in train_rows) > 1


@each_tokenizer
def test_an_epoch_is_what_webdataset_reads_every_row_once(
    folder: Path, train_rows: list[Row]
) -> None:
    loader = make_loader(folder)
    num_steps = -(-len(train_rows) // 8)
    seen: list[int] = []
    for step in range(num_steps):
        batches = loader.micro_batches(step)
        assert len(batches) == 4
        for number, batch in enumerate(batches):
            assert len(batch.row_ids) == 2
            assert batch.first_position == step * 8 + number * 2
            assert_is_rows(batch, [train_rows[row] for row in batch.row_ids])
            seen += batch.row_ids
    assert sorted(seen[: len(train_rows)]) == list(range(len(train_rows)))
    assert seen[: len(train_rows)] != list(range(len(train_rows)))


@pytest.mark.parametrize("which", ["shards"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_batch_of_a_step_is_the_same_for_any_number_of_ranks(
    folder: Path, world_size: int
) -> None:
    for step in (0, 1, 40):
        assert step_rows(folder, step, world_size) == step_rows(folder, step, 1)


@pytest.mark.parametrize("which", ["shards"])
def test_any_step_may_be_asked_for_first(folder: Path) -> None:
    in_order = make_loader(folder)
    for step in range(6):
        expected = in_order.micro_batches(step)
    resumed = make_loader(folder).micro_batches(5)
    for one, other in zip(resumed, expected, strict=True):
        assert one.row_ids == other.row_ids
        assert torch.equal(one.input_ids, other.input_ids)


@each_tokenizer
@pytest.mark.parametrize("language", ["de", "sw"])
def test_heldout_is_all_of_a_language_and_nothing_that_is_trained_on(
    folder: Path, train_rows: list[Row], which: str, language: str
) -> None:
    heldout_rows = read_rows(folder, f"heldout-{language}-*.tar", CLS_SEP_PAD[which])
    batches = make_loader(folder, micro=2).heldout(language)
    assert [len(batch.row_ids) for batch in batches] == [2, 1]
    assert [row for batch in batches for row in batch.row_ids] == [0, 1, 2]
    assert [batch.first_position for batch in batches] == [0, 2]
    for batch in batches:
        assert_is_rows(batch, [heldout_rows[row] for row in batch.row_ids])
    trained_on = {tuple(segment) for row in train_rows for segment in row.segments}
    apart = {tuple(segment) for row in heldout_rows for segment in row.segments}
    assert apart
    assert not apart & trained_on


@pytest.mark.parametrize("which", ["shards"])
def test_every_rank_evaluates_the_same_heldout_rows(folder: Path) -> None:
    first, second = make_loader(folder, 0, 2).heldout("de"), make_loader(folder, 1, 2).heldout("de")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("which", ["shards"])
def test_an_id_that_changed_on_disk_is_refused_not_trained_on(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "shards")
    reader = ShardReader(str(copy))
    (first, *_), ids = reader.blocks(), reader.read_block(0)[0]
    tar = copy / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(ids.tobytes(), first.offset) + 3 * ids.itemsize] ^= 1
    tar.write_bytes(data)
    with pytest.raises(RunError, match=r"train-000000\.tar.*damaged"):
        [make_loader(copy).micro_batches(step) for step in range(40)]


def fake_reader(rows_of_blocks: list[int]) -> SimpleNamespace:
    blocks = [Block(offset=0, bytes=0, rows=rows, crc32=0) for rows in rows_of_blocks]
    manifest = SimpleNamespace(special_ids={"pad": 1}, rows=sum(rows_of_blocks))
    return SimpleNamespace(url="there", manifest=manifest, blocks=lambda: blocks)


def test_short_blocks_are_refused_before_the_last(one_rank: Topology) -> None:
    Loader(fake_reader([8, 8, 3]), one_rank, batch_size=4, micro=2, seed=1)
    Loader(fake_reader([3]), one_rank, batch_size=4, micro=2, seed=1)
    for rows in ([8, 3, 8], [3, 8], [8, 8, 3, 8]):
        with pytest.raises(RunError, match=r"there has short blocks.*prepare"):
            Loader(fake_reader(rows), one_rank, batch_size=4, micro=2, seed=1)


def test_moving_a_batch_leaves_the_boundaries_on_the_host(shards: Path, one_rank: Topology) -> None:
    batch = make_loader(shards).micro_batches(0)[0]
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.positions.device.type == "meta"
    assert moved.cu_seqlens.device.type == "cpu"
    assert (moved.row_ids, moved.first_position) == (batch.row_ids, batch.first_position)


def test_blocks_are_read_once_while_they_are_near(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, reads = make_loader(shards), []
    plain: Callable[..., object] = ShardReader.read_block
    monkeypatch.setattr(
        ShardReader,
        "read_block",
        lambda self, index, *, language=None: (
            reads.append(index) or plain(self, index, language=language)
        ),
    )
    for step in range(4):  # 32 rows, blocks of 7, one of which may be shorter
        loader.micro_batches(step)
    assert 5 <= len(reads) == len(set(reads)) <= 6
