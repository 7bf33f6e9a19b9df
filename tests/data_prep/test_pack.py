from __future__ import annotations

import collections
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pack import (
    FRAME,
    MIN_PIECE,
    SENTENCE_REACH,
    TARGET_FILL,
    WORD_REACH,
    Segment,
    best_fit,
    cut,
    fill_holes,
    nearest_cut,
    pack,
)


def anywhere(segment: Segment, length: int) -> int:
    return length


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


def naive_word(starts_word: Sequence[bool], length: int) -> int:
    """The longest head, at most an eighth shorter than `length`, behind which a word starts."""
    for shorter in range(length, max(1, length - length // WORD_REACH) - 1, -1):
        if starts_word[shorter]:
            return shorter
    return length


def naive_cut(starts_word: list[bool], ends_sentence: list[bool], seq_len: int) -> list[int]:
    """Pieces by their definition: back from the row's end to a sentence's end, else a word's."""
    longest = seq_len - FRAME
    if len(starts_word) <= longest:
        return [len(starts_word)] if starts_word else []
    piece = None
    marks_words = any(starts_word[longest - longest // WORD_REACH : longest + 1])
    for length in range(longest, max(1, longest - longest // SENTENCE_REACH) - 1, -1):
        if piece is None and ends_sentence[length - 1]:
            if starts_word[length] or not marks_words:
                piece = length
    piece = piece or naive_word(starts_word, longest)
    return [piece, *naive_cut(starts_word[piece:], ends_sentence[piece:], seq_len)]


@given(st.integers(0, 2000), st.integers(8, 300), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0))
def test_cut_goes_back_to_a_sentence_or_a_word(
    num_tokens: int, seq_len: int, share: float, seed: int
) -> None:
    starts_word, ends_sentence = np.random.default_rng(seed).random((2, num_tokens)) < share
    lengths = cut(starts_word.tobytes(), ends_sentence.tobytes(), seq_len)
    assert lengths == naive_cut(starts_word.tolist(), ends_sentence.tolist(), seq_len)
    assert sum(lengths) == num_tokens
    assert all(1 <= length <= seq_len - FRAME for length in lengths)


def test_a_sentence_that_ends_near_is_worth_more_than_a_word() -> None:
    starts_word, ends_sentence = np.ones(1000, dtype=bool), np.zeros(1000, dtype=bool)
    ends_sentence[495] = True  # 14 tokens short of a full row, beyond a 64th of it
    assert cut(starts_word.tobytes(), ends_sentence.tobytes(), 512) == [510, 490]
    ends_sentence[505] = True
    assert cut(starts_word.tobytes(), ends_sentence.tobytes(), 512) == [506, 494]
    starts_word[506] = False  # as in 3.14: no sentence ends inside a word
    assert cut(starts_word.tobytes(), ends_sentence.tobytes(), 512) == [510, 490]


@given(st.lists(st.booleans(), min_size=2, max_size=200), st.data())
def test_nearest_cut_is_between_words_where_it_can_be(
    starts_word: list[bool], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(starts_word) - 2))
    length = data.draw(st.integers(1, len(starts_word) - start - 1))
    assert nearest_cut(bytes(starts_word), start, length) == naive_word(starts_word[start:], length)


def tokens_of(segments: list[Segment]) -> collections.Counter[tuple[int, int]]:
    return collections.Counter(
        (s.document, token) for s in segments for token in range(s.start, s.start + s.length)
    )


def assert_packed(segments: list[Segment], rows: list[list[Segment]], seq_len: int) -> float:
    """Every token once and no row above its capacity; returns the fill."""
    assert tokens_of([s for row in rows for s in row]) == tokens_of(segments)
    used = [sum(s.length + FRAME for s in row) for row in rows]
    assert all(row for row in rows)
    assert all(s.length > 0 for row in rows for s in row)
    assert max(used, default=0) <= seq_len
    return sum(used) / (len(rows) * seq_len) if rows else 1.0


def cut_anywhere(lengths: list[int], seq_len: int) -> list[Segment]:
    longest = seq_len - FRAME
    return [
        Segment(document, start, min(longest, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, longest)
    ]


segments_and_size = st.integers(8, 64).flatmap(
    lambda seq_len: st.tuples(st.lists(st.integers(1, 3 * seq_len), max_size=40), st.just(seq_len))
)
shortens = st.sampled_from(
    [anywhere, lambda segment, length: 1, lambda segment, length: length - length // 3]
)


@given(segments_and_size, shortens)
def test_pack_keeps_every_token_once(case: tuple[list[int], int], shorten) -> None:
    lengths, seq_len = case
    segments = cut_anywhere(lengths, seq_len)
    assert_packed(segments, pack(segments, seq_len, shorten), seq_len)


@given(segments_and_size, shortens)
def test_fill_holes_keeps_every_token_once_from_any_rows(
    case: tuple[list[int], int], shorten
) -> None:
    lengths, seq_len = case
    segments = cut_anywhere(lengths, seq_len)
    one_a_row = [[segment] for segment in segments]  # as bad as rows can be
    assert_packed(segments, fill_holes(one_a_row, seq_len, shorten), seq_len)


@pytest.mark.parametrize("seq_len", [128, 512])
@pytest.mark.parametrize("share", [0.51, 0.6, 0.75, 0.9])
def test_equal_documents_that_do_not_share_a_row_are_cut_to_fill_it(
    seq_len: int, share: float
) -> None:
    segments = [Segment(i, 0, round(share * seq_len) - FRAME) for i in range(500)]
    assert len(best_fit([s.length + FRAME for s in segments], seq_len)) == 500
    assert assert_packed(segments, pack(segments, seq_len, anywhere), seq_len) >= 0.99


def test_pieces_end_where_shorten_says() -> None:
    asked: list[tuple[Segment, int]] = []

    def to_a_multiple_of_five(segment: Segment, length: int) -> int:
        asked.append((segment, length))
        return max(1, length - (segment.start + length) % 5)

    segments = [Segment(i, 0, 80) for i in range(300)]
    rows = pack(segments, 128, to_a_multiple_of_five)
    assert assert_packed(segments, rows, 128) > 0.95
    starts = [s.start for row in rows for s in row if s.start]
    assert starts
    assert all(start % 5 == 0 for start in starts)
    assert all(MIN_PIECE <= length < segment.length for segment, length in asked)


def test_text_that_fills_rows_already_is_not_cut() -> None:
    random_ = random.Random(0)
    segments = [Segment(i, 0, random_.randint(1, 60)) for i in range(5000)]
    rows = pack(segments, 512, anywhere)
    assert assert_packed(segments, rows, 512) >= TARGET_FILL
    assert sorted(s for row in rows for s in row) == segments
    full_but_few = [Segment(i, 0, 510 if i < 1000 else 470) for i in range(1020)]
    rows = pack(full_but_few, 512, anywhere)
    assert sorted(s for row in rows for s in row) == full_but_few


def test_pieces_cut_off_are_worth_their_frame() -> None:
    segments = [Segment(i, 0, 77 - FRAME) for i in range(1000)]
    for shorten in (anywhere, lambda segment, length: 1):
        rows = pack(segments, 128, shorten)
        assert min(s.length for row in rows for s in row) >= MIN_PIECE


def test_text_without_spaces_is_cut_after_a_sentence() -> None:
    tokens, longest = 1000, 510
    starts_word, ends_sentence = np.zeros((2, tokens), dtype=bool)
    ends_sentence[[100, 505, 507]] = True
    assert cut(starts_word.tobytes(), ends_sentence.tobytes(), longest + FRAME) == [508, 492]
    starts_word[[504, 509]] = True  # words are marked, and none starts after the sentence: "3.14"
    assert cut(starts_word.tobytes(), ends_sentence.tobytes(), longest + FRAME)[0] == 509
