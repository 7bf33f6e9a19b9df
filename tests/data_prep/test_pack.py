from __future__ import annotations

import collections
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pack import FRAME, MIN_PIECE, TARGET_FILL, Segment, best_fit, cut, fill_holes, pack


def brute_force_free_space(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing by its definition: what is free in each row, sorted."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(free)) if free[row] >= length]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


items = st.integers(8, 70).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@given(items)
def test_best_fit_is_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    free = [capacity - sum(lengths[item] for item in row) for row in rows]
    assert sorted(free) == brute_force_free_space(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))


def test_best_fit_breaks_ties_by_index() -> None:
    assert best_fit([5, 5, 5, 3], 8) == [[0], [1], [2, 3]]


@given(st.integers(0, 2000), st.integers(8, 128))
def test_cut_covers_a_document_in_pieces_that_fit(num_tokens: int, seq_len: int) -> None:
    segments = cut(7, num_tokens, seq_len)
    covered = [t for s in segments for t in range(s.start, s.start + s.length)]
    assert covered == list(range(num_tokens))
    assert all(s.document == 7 and 1 <= s.length <= seq_len - FRAME for s in segments)


def tokens_of(segments: list[Segment]) -> collections.Counter[tuple[int, int]]:
    return collections.Counter(
        (s.document, token) for s in segments for token in range(s.start, s.start + s.length)
    )


def assert_packed(segments: list[Segment], rows: list[list[Segment]], seq_len: int) -> float:
    """Every token once and no row above its capacity; returns the fill."""
    assert tokens_of([s for row in rows for s in row]) == tokens_of(segments)
    used = [sum(s.length + FRAME for s in row) for row in rows]
    assert all(row for row in rows)
    assert max(used, default=0) <= seq_len
    return sum(used) / (len(rows) * seq_len) if rows else 1.0


segments_and_size = st.integers(8, 64).flatmap(
    lambda seq_len: st.tuples(st.lists(st.integers(1, 3 * seq_len), max_size=40), st.just(seq_len))
)


@given(segments_and_size)
def test_pack_keeps_every_token_once(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    segments = [s for document, n in enumerate(lengths) for s in cut(document, n, seq_len)]
    assert_packed(segments, pack(segments, seq_len), seq_len)


@given(segments_and_size)
def test_fill_holes_keeps_every_token_once_from_any_rows(case: tuple[list[int], int]) -> None:
    lengths, seq_len = case
    segments = [s for document, n in enumerate(lengths) for s in cut(document, n, seq_len)]
    one_a_row = [[segment] for segment in segments]  # as bad as rows can be
    assert_packed(segments, fill_holes(one_a_row, seq_len), seq_len)


@pytest.mark.parametrize("seq_len", [128, 512])
@pytest.mark.parametrize("share", [0.51, 0.6, 0.75, 0.9])
def test_equal_documents_that_do_not_share_a_row_are_cut_to_fill_it(
    seq_len: int, share: float
) -> None:
    segments = [Segment(i, 0, round(share * seq_len) - FRAME) for i in range(1000)]
    assert len(best_fit([s.length + FRAME for s in segments], seq_len)) == 1000
    assert assert_packed(segments, pack(segments, seq_len), seq_len) >= 0.99


def test_text_that_fills_rows_already_is_not_cut() -> None:
    random_ = random.Random(0)
    segments = [Segment(i, 0, random_.randint(1, 60)) for i in range(5000)]
    rows = pack(segments, 512)
    assert assert_packed(segments, rows, 512) >= TARGET_FILL
    assert sorted(s for row in rows for s in row) == segments
    full_but_few = [Segment(i, 0, 510 if i < 1000 else 470) for i in range(1020)]
    rows = pack(full_but_few, 512)
    assert sorted(s for row in rows for s in row) == full_but_few


def test_pieces_cut_off_are_worth_their_frame() -> None:
    segments = [Segment(i, 0, 77 - FRAME) for i in range(1000)]
    rows = pack(segments, 128)
    assert min(s.length for row in rows for s in row) >= MIN_PIECE
