from __future__ import annotations

import itertools

import pytest

from pipeline.assignment import DataOrder, Permutation

# rows, rows a block: with and without a short last block, one block, blocks of one row
SIZES = [(1, 1), (1, 4), (7, 1), (8, 4), (10, 4), (13, 5), (33, 32), (64, 8), (97, 10)]
# batch, micro-batch, and every number of ranks that shares it evenly
BATCHES = [(4, 1, (1, 2, 4)), (8, 2, (1, 2, 4)), (12, 2, (1, 2, 3, 6)), (6, 6, (1,))]


def make_order(rows: int, block: int, batch: int = 4, micro: int = 1, seed: int = 1) -> DataOrder:
    return DataOrder(
        num_rows=rows, rows_per_block=block, batch_size=batch, micro_batch_size=micro, seed=seed
    )


def read_step(order: DataOrder, step: int, world_size: int) -> list[int]:
    """The positions of a step's rows, rank by rank."""
    num_micro_steps = order.batch_size // (order.micro_batch_size * world_size)
    return [
        position
        for rank in range(world_size)
        for micro_step in range(num_micro_steps)
        for position in order.rows(step, micro_step, rank, world_size)
    ]


@pytest.mark.parametrize("key", ["1/0", "1/1", "x"])
def test_a_permutation_is_one_to_one_and_its_inverse_undoes_it(key: str) -> None:
    for n in range(1, 301):
        permutation = Permutation(n, key=key)
        images = [permutation(index) for index in range(n)]
        assert sorted(images) == list(range(n)), n
        assert [permutation.inverse(image) for image in images] == list(range(n)), n


def test_a_large_permutation_needs_no_table() -> None:
    n = 10**15 + 7
    permutation = Permutation(n, key="1/0")
    images = {permutation(index) for index in range(100)}
    assert len(images) == 100
    assert all(0 <= image < n for image in images)
    assert [permutation.inverse(permutation(index)) for index in (0, 5, n - 1)] == [0, 5, n - 1]


def test_a_permutation_mixes() -> None:
    n = 300
    images = [Permutation(n, key="1/0")(index) for index in range(n)]
    assert sum(index == image for index, image in enumerate(images)) < 10
    assert sum(b == a + 1 for a, b in itertools.pairwise(images)) < 10
    other = [Permutation(n, key="1/1")(index) for index in range(n)]
    assert sum(a == b for a, b in zip(images, other, strict=True)) < 10


def test_the_order_is_part_of_every_run() -> None:
    """Another algorithm would make resumed runs read rows twice: it needs a new release."""
    permutation = Permutation(10, key="1/0")
    assert [permutation(index) for index in range(10)] == [2, 8, 7, 3, 0, 1, 5, 4, 6, 9]
    rows = list(make_order(9, 2).row_ids(range(18)))
    assert rows == [4, 5, 2, 3, 8, 6, 7, 0, 1, 6, 7, 8, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("rows", "block"), SIZES)
def test_an_epoch_is_every_row_once(rows: int, block: int) -> None:
    order = make_order(rows, block)
    for epoch in range(4):
        stream = order.row_ids(range(epoch * rows, (epoch + 1) * rows))
        assert sorted(stream) == list(range(rows))


@pytest.mark.parametrize(("rows", "block"), SIZES)
def test_locate_names_rows_that_exist_and_keeps_blocks_together(rows: int, block: int) -> None:
    order = make_order(rows, block)
    located = [order.locate(position) for position in range(rows)]
    for (block_a, row_a), (block_b, row_b) in itertools.pairwise(located):
        if row_b:
            assert (block_b, row_b) == (block_a, row_a + 1)
    blocks = [index for index, _ in itertools.groupby(located, key=lambda place: place[0])]
    assert sorted(blocks) == list(range(-(-rows // block)))  # each in one piece


@pytest.mark.parametrize(("rows", "block"), SIZES)
def test_runs_are_what_locate_finds_row_by_row_in_as_few_pieces(rows: int, block: int) -> None:
    order = make_order(rows, block)
    for positions in (range(4 * rows), range(rows // 2, 2 * rows + 1), range(rows, rows)):
        places = [(index, row) for index, run in order.runs(positions) for row in run]
        assert places == [order.locate(position) for position in positions]
    for epoch in range(4):
        blocks = [index for index, _ in order.runs(range(epoch * rows, (epoch + 1) * rows))]
        assert sorted(blocks) == list(range(-(-rows // block)))


def test_the_short_last_block_moves_through_the_epochs() -> None:
    order = make_order(10, 4)
    places = {
        [order.locate(epoch * 10 + index) for index in range(10)].index((2, 0))
        for epoch in range(30)
    }
    assert places == {0, 4, 8}


@pytest.mark.parametrize(("batch", "micro", "worlds"), BATCHES)
@pytest.mark.parametrize(("rows", "block"), SIZES)
def test_a_step_is_the_same_rows_for_any_number_of_ranks(
    rows: int, block: int, batch: int, micro: int, worlds: tuple[int, ...]
) -> None:
    order = make_order(rows, block, batch, micro)
    for step, world_size in itertools.product(range(3), worlds):
        whole_batch = list(range(step * batch, (step + 1) * batch))
        assert read_step(order, step, world_size) == whole_batch


def test_a_stream_does_not_depend_on_how_it_is_cut_into_batches() -> None:
    small, large = make_order(97, 10, batch=4), make_order(97, 10, batch=12, micro=2)
    in_small = [p for step in range(6) for p in read_step(small, step, 2)]
    in_large = [p for step in range(2) for p in read_step(large, step, 3)]
    assert in_small == in_large
    assert list(small.row_ids(range(200))) == list(large.row_ids(range(200)))


def test_a_rank_reads_a_contiguous_slice() -> None:
    order = make_order(97, 10, batch=12, micro=2)
    rank_1 = [p for m in range(2) for p in order.rows(step=5, micro_step=m, rank=1, world_size=3)]
    assert rank_1 == [64, 65, 66, 67]


@pytest.mark.parametrize(("rows", "block"), [(64, 8), (97, 10)])
def test_epochs_and_seeds_differ(rows: int, block: int) -> None:
    def epoch(number: int, seed: int) -> tuple[int, ...]:
        start = number * rows
        return tuple(make_order(rows, block, seed=seed).row_ids(range(start, start + rows)))

    orders = {epoch(number, seed) for number in range(5) for seed in (1, 2)}
    assert len(orders) == 10
