from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import fsspec
import numpy as np
import pytest
import torch
import webdataset

import pipeline.loader
from data_prep.command import ConfigError, RunError
from data_prep.shards import Block, ShardReader
from pipeline.config import Recipe
from pipeline.loader import Batch, Loader, open_shards
from pipeline.masking import Masking
from pipeline.models import load_tokenizer
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
    folder: Path | str,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 8,
    micro: int = 2,
    masking: Masking | None = None,
) -> Loader:
    topology = Topology(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size
    )
    reader = ShardReader(str(folder))
    return Loader(reader, topology, batch_size=batch_size, micro=micro, seed=SEED, masking=masking)


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


def test_moving_a_batch_moves_all_of_it(shards: Path, one_rank: Topology) -> None:
    batch = make_loader(shards).micro_batches(0)[0]
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.positions.device.type == "meta"
    assert moved.cu_seqlens.device.type == "meta"
    assert (moved.row_ids, moved.first_position) == (batch.row_ids, batch.first_position)


# Masked text


@pytest.fixture
def masking(folder: Path, which: str, request: pytest.FixtureRequest) -> Masking:
    tokenizer = {"shards": "pocket_teacher", "bert_shards": "bert_tokenizer"}[which]
    return Masking(load_tokenizer(str(request.getfixturevalue(tokenizer))), 0.15, SEED)


def unmasked(batch: Batch) -> torch.Tensor:
    """The ids as they were, from what is shown and what is to be predicted."""
    assert batch.masked is not None
    ids = batch.input_ids.clone()
    ids[0, batch.masked.places] = batch.masked.labels
    return ids


@each_tokenizer
def test_masked_text_is_the_text_but_for_what_is_to_be_predicted(
    folder: Path, which: str, masking: Masking
) -> None:
    num_masked = num_tokens = 0
    for step in range(10):
        plain = make_loader(folder).micro_batches(step)
        for text, batch in zip(
            plain, make_loader(folder, masking=masking).micro_batches(step), strict=True
        ):
            assert batch.masked is not None
            places, labels = batch.masked
            assert torch.equal(unmasked(batch), text.input_ids)
            assert (places.dtype, labels.dtype) == (torch.int64, torch.int64)
            assert not torch.isin(labels, torch.tensor(CLS_SEP_PAD[which])).any()
            assert torch.equal(batch.cu_seqlens, text.cu_seqlens)
            assert batch.count == (text.num_tokens, len(places))
            assert torch.equal(batch.inputs[4], places)
            num_masked, num_tokens = num_masked + len(places), num_tokens + text.num_tokens
    assert 0.1 < num_masked / num_tokens < 0.16  # special tokens are never chosen


@pytest.mark.parametrize("which", ["shards"])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_rows_mask_is_the_same_for_any_ranks_and_micro_batches(
    folder: Path, masking: Masking, world_size: int, micro: int
) -> None:
    def shown(world_size: int, micro: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [
            batch
            for rank in range(world_size)
            for batch in make_loader(
                folder, rank, world_size, micro=micro, masking=masking
            ).micro_batches(step)
        ]
        labels = [batch.masked.labels for batch in batches if batch.masked is not None]
        return torch.cat([batch.input_ids for batch in batches], dim=1), torch.cat(labels)

    for step in (0, 1, 40):
        for ours, theirs in zip(shown(world_size, micro, step), shown(1, 2, step), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("which", ["shards"])
def test_another_epoch_masks_a_row_elsewhere(folder: Path, masking: Masking) -> None:
    num_rows = ShardReader(str(folder)).manifest.rows
    loader = make_loader(folder, micro=1, masking=masking)
    masks: dict[int, set[tuple[int, ...]]] = {}
    for step in range(-(-2 * num_rows // 8)):
        for batch in loader.micro_batches(step):
            assert batch.masked is not None
            masks.setdefault(batch.row_ids[0], set()).add(tuple(batch.masked.places.tolist()))
    assert sum(len(seen) == 2 for seen in masks.values()) > 0.9 * num_rows


@pytest.mark.parametrize("which", ["shards"])
def test_heldout_rows_have_one_mask_for_good(folder: Path, masking: Masking) -> None:
    def masks(language: str, rank: int, micro: int) -> list[int]:
        ids: list[int] = []
        for batch in make_loader(folder, rank, 2, micro=micro, masking=masking).heldout(language):
            ids += batch.input_ids[0].tolist()
        return ids

    assert masks("de", 0, 2) == masks("de", 1, 2) == masks("de", 0, 1)
    (batch, *_) = make_loader(folder, masking=masking).heldout("de")
    assert batch.masked is not None
    assert len(batch.masked.places)


@pytest.mark.parametrize("which", ["shards"])
def test_moving_a_batch_moves_what_is_to_be_predicted(folder: Path, masking: Masking) -> None:
    moved = make_loader(folder, masking=masking).micro_batches(0)[0].to(torch.device("meta"))
    assert moved.masked is not None
    assert {tensor.device.type for tensor in moved.masked} == {"meta"}


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(batches, expected, strict=True):
        assert (one.first_position, one.row_ids) == (other.first_position, other.row_ids)
        for name in ("input_ids", "positions", "cu_seqlens"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def step_blocks(loader: Loader, step: int) -> set[int]:
    """The blocks that hold the rows of a step of 8."""
    return {block for block, _ in loader.order.runs(range(8 * step, 8 * step + 8))}


def finish_reading_ahead() -> None:
    while reading := [t for t in threading.enumerate() if t.name.startswith("read-")]:
        for thread in reading:
            thread.join()


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Which block was read by which thread, in order."""
    finish_reading_ahead()  # what earlier tests left
    reads: list[tuple[int, str]] = []
    plain: Callable[..., object] = ShardReader.read_block

    def read_block(self: ShardReader, index: int, *, language: str | None = None) -> object:
        reads.append((index, threading.current_thread().name))
        return plain(self, index, language=language)

    monkeypatch.setattr(ShardReader, "read_block", read_block)
    return reads


def test_blocks_are_read_once_while_they_are_near(
    shards: Path, readers: list[tuple[int, str]]
) -> None:
    loader = make_loader(shards)
    for step in range(3):  # 32 rows with what is read ahead, blocks of 7, one may be shorter
        loader.micro_batches(step)
    finish_reading_ahead()
    reads = [index for index, _ in readers]
    assert 5 <= len(reads) == len(set(reads)) <= 6


@pytest.mark.parametrize(
    "steps",
    [range(20), [0, 0, 1, 1, 1, 2], [0, 5, 6, 2, 3, 40, 41, 4, 0]],
    ids=["forward", "repeated", "jumps"],
)
def test_reading_ahead_changes_no_batch(shards: Path, steps: list[int]) -> None:
    loader = make_loader(shards)
    for step in steps:
        not_ahead = make_loader(shards).micro_batches(step)  # the first that this loader is asked
        assert_same(loader.micro_batches(step), not_ahead)


def test_the_next_step_is_read_while_this_one_is_in_use(
    shards: Path, readers: list[tuple[int, str]]
) -> None:
    loader = make_loader(shards)
    for step in range(8):
        loader.micro_batches(step)
        finish_reading_ahead()
        assert step_blocks(loader, step) | step_blocks(loader, step + 1) <= dict(readers).keys()
    assert {block for block, thread in readers if thread == "MainThread"} == step_blocks(loader, 0)


def test_damage_ends_the_step_that_reads_it_also_when_it_was_read_ahead(
    shards: Path, tmp_path: Path, readers: list[tuple[int, str]]
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    blocks = [step_blocks(make_loader(copy), step) for step in range(7)]
    (damaged, *_) = blocks[6] - set().union(*blocks[:6])
    block = ShardReader(str(copy)).blocks()[damaged]
    name = f"train-{damaged // 3:06d}.tar"
    data = bytearray((copy / name).read_bytes())
    data[block.offset + block.bytes // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(RunError, match=rf"{name}.*damaged: its CRC") as not_ahead:
        make_loader(copy).micro_batches(6)
    readers.clear()
    loader = make_loader(copy)
    for step in range(6):
        loader.micro_batches(step)
        finish_reading_ahead()
    assert [thread for index, thread in readers if index == damaged] == ["read-step-6"]
    for _ in range(2):
        with pytest.raises(RunError) as ahead:
            loader.micro_batches(6)
        assert str(ahead.value) == str(not_ahead.value)
    assert_same(loader.micro_batches(1), make_loader(copy).micro_batches(1))


# Remote shards


class Slow:
    """Reads of remote blocks that count how many go on at once, and can wait for each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock, self.now, self.most, self.blocks = threading.Lock(), 0, 0, Counter[int]()
        plain: Callable[..., object] = ShardReader.read_block

        def read_block(reader: ShardReader, index: int, *, language: str | None = None) -> object:
            with self.lock:
                self.now += 1
                self.blocks[index] += 1
                self.most = max(self.most, self.now)
            time.sleep(0.005)
            try:
                return plain(reader, index, language=language)
            finally:
                with self.lock:
                    self.now -= 1

        monkeypatch.setattr(ShardReader, "read_block", read_block)


@pytest.fixture
def remote(shards: Path) -> Iterator[str]:
    """The shards in a file system that is not local."""
    memory = fsspec.filesystem("memory")
    for path in filter(Path.is_file, shards.iterdir()):
        memory.pipe_file(f"/{shards.parent.name}/{path.name}", path.read_bytes())
    yield f"memory://{shards.parent.name}"
    finish_reading_ahead()
    memory.rm(f"/{shards.parent.name}", recursive=True)


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("world_size", [1, 2])
def test_remote_shards_give_the_same_batches(
    shards: Path, remote: str, world_size: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        make_loader(shards, rank, world_size, batch_size=batch_size) for rank in range(world_size)
    ]
    Slow(monkeypatch)
    for rank, local in enumerate(expected):
        far = make_loader(remote, rank, world_size, batch_size=batch_size)
        for step in (0, 1, 2, 3, 9, 10, 2, 60, 61):
            assert_same(far.micro_batches(step), local.micro_batches(step))
        for language in ("de", "en"):
            assert_same(far.heldout(language), local.heldout(language))


def test_remote_blocks_are_read_at_once_and_once(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, loader = Slow(monkeypatch), make_loader(remote)
    for step in range(3):  # with what is read ahead, less than an epoch
        loader.micro_batches(step)
        coming = set().union(*(step_blocks(loader, ahead) for ahead in range(step, step + 6)))
        assert coming <= slow.blocks.keys()
    finish_reading_ahead()
    assert max(slow.blocks.values()) == 1
    assert 1 < slow.most <= pipeline.loader.READS_AT_ONCE


def test_a_large_step_reads_no_more_than_some_blocks_at_once(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.loader, "READS_AT_ONCE", 3)
    slow = Slow(monkeypatch)
    make_loader(remote, batch_size=64).micro_batches(0)
    finish_reading_ahead()
    assert slow.most == 3


def test_damage_of_a_remote_block_is_named_by_the_step_that_reads_it(
    shards: Path, remote: str
) -> None:
    blocks = [step_blocks(make_loader(shards), step) for step in range(7)]
    (damaged, *_) = blocks[6] - set().union(*blocks[:6])
    block = ShardReader(str(shards)).blocks()[damaged]
    path = f"/{shards.parent.name}/train-{damaged // 3:06d}.tar"
    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat_file(path))
    data[block.offset + block.bytes // 2] ^= 1
    memory.pipe_file(path, bytes(data))
    loader = make_loader(remote)
    for step in range(6):
        assert_same(loader.micro_batches(step), make_loader(shards).micro_batches(step))
    for _ in range(2):
        with pytest.raises(RunError, match=rf"memory://.*train-{damaged // 3:06d}\.tar.*its CRC"):
            loader.micro_batches(6)


def test_a_recipe_says_how_shards_are_read(
    shards: Path, tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    cache = tmp_path / "cache"
    recipe = make_recipe(
        data={"shards": str(shards), "verify": "never", "cache_dir": str(cache), "cache_gb": 1e-6}
    )
    reader = open_shards(recipe)
    expected = ShardReader(str(shards)).read_block(0)
    assert all(np.array_equal(a, b) for a, b in zip(reader.read_block(0), expected, strict=True))
    assert reader._verify == "never"
    assert not list(cache.glob("*.block"))  # no block is as small as the bound
    kept = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache_gb=1.0))
    open_shards(kept).read_block(0)
    assert len(list(cache.glob("*.block"))) == 1
    with pytest.raises(ConfigError, match="holds other shards"):
        open_shards(recipe, "ab" * 32)


LEAVES = {
    "drop": "del loader",
    "keep": "",
    "fork": """
child = os.fork()
if not child:
    signal.alarm(60)
    batches = loader.micro_batches(1)
    os._exit(7 if batches[0].first_position == 8 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
""",
}


@pytest.mark.parametrize("leave", sorted(LEAVES))
def test_a_read_ahead_that_hangs_keeps_neither_the_process_nor_a_fork(
    shards: Path, repo: Path, leave: str
) -> None:
    script = f"""
import os, signal, threading, time
import pipeline.loader
from data_prep.shards import ShardReader
from tests.pipeline.unit.test_loader import Path, make_loader

plain, hangs = ShardReader.read_block, threading.Event()

def read_block(*args, **options):
    if threading.current_thread() is not threading.main_thread():
        hangs.set()
        time.sleep(600)
    return plain(*args, **options)

ShardReader.read_block = read_block
pipeline.loader.EXIT_PATIENCE = 0.5
loader = make_loader(Path({str(shards)!r}))
loader.micro_batches(0)
assert hangs.wait(60)
{LEAVES[leave]}
"""
    env = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=60)


def test_batches_for_a_gpu_are_pinned_where_they_are_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, str] = {}

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        copy = self.clone()
        pinned[copy.data_ptr()] = threading.current_thread().name
        return copy

    plain = make_loader(shards).micro_batches(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    loader = make_loader(shards)
    loader.micro_batches(0)
    finish_reading_ahead()
    batches = loader.micro_batches(1)
    finish_reading_ahead()
    for batch in batches:
        for tensor in (batch.input_ids, batch.positions):
            assert pinned[tensor.data_ptr()] == "read-step-1"
    assert_same(batches, plain)
