"""Segments into rows: best fit, then the emptiest rows are cut up to fill the others' holes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

FRAME = 2  # every segment carries one token before its content and one after
TARGET_FILL = 0.995  # documents are cut only as far as this needs
MIN_PIECE = 3  # tokens of content in a piece that is cut off to fill a hole
SENTENCE_REACH = 64  # a sentence's end is worth 1/64 of a row
WORD_REACH = 8  # and a word's 1/8 of it, or of a piece: most words are much shorter


class Segment(NamedTuple):
    """`length` tokens of document `document` from its token `start`; FRAME is not counted."""

    document: int
    start: int
    length: int


def cut(starts_word: bytes, ends_sentence: bytes, seq_len: int) -> list[int]:
    """The lengths of the pieces that a document is cut into, so that each fits a row.

    A piece ends with a sentence if one ends near the row's end, otherwise with a word, otherwise
    where the row is full: holes that are left have to be filled with pieces of other documents.

    Args:
        starts_word: [tokens] 1 where a word starts with the token, otherwise 0.
        ends_sentence: [tokens] 1 where a sentence ends with it, otherwise 0.
        seq_len: tokens of a row, FRAME included.
    """
    longest, lengths, start = seq_len - FRAME, [], 0
    while len(starts_word) - start > longest:
        stop = start + longest
        # In a script without spaces no word's start is marked.
        marks_words = starts_word.rfind(1, stop - longest // WORD_REACH, stop + 1) >= 0
        first = max(start + 1, stop - longest // SENTENCE_REACH)
        at = ends_sentence.rfind(1, first - 1, stop) + 1
        while at and marks_words and not starts_word[at]:
            at = ends_sentence.rfind(1, first - 1, at - 1) + 1
        length = at - start if at else nearest_cut(starts_word, start, longest)
        lengths.append(length)
        start += length
    return [*lengths, len(starts_word) - start] if len(starts_word) else []


def nearest_cut(starts_word: bytes, start: int, length: int) -> int:
    """The most tokens, at most `length` and not many fewer, that end with a word.

    Args:
        starts_word: [start + length + 1 or more] 1 where a word starts with the token, otherwise 0.
        start: where the piece begins.
        length: of the piece, if nothing better is near.
    """
    nearest = start + max(1, length - length // WORD_REACH)
    found = starts_word.rfind(1, nearest, start + length + 1)
    return found - start if found >= 0 else length


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, into the fullest row that still takes it.

    Args:
        lengths: sizes, each from 1 to `capacity`.
        capacity: of a row.

    Returns:
        For each row the indices of its items. Ties are broken by index, so the answer is a pure
        function of the arguments.
    """
    rows: list[list[int]] = []
    rows_by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit f: some row has f tokens free; finds the best fit without a search
    for item in np.argsort(-np.array(lengths, np.int64), kind="stable").tolist():
        length = lengths[item]
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                occupied ^= 1 << free
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        rows_by_free[free - length].append(row)
        occupied |= 1 << (free - length)
    return rows


Shorten = Callable[[Segment, int], int]  # the best length for a segment's head, at most that


def pack(segments: Sequence[Segment], seq_len: int, shorten: Shorten) -> list[list[Segment]]:
    """Rows of at most `seq_len` tokens that hold every token of every segment exactly once.

    Args:
        segments: what there is.
        seq_len: tokens of a row, frames included.
        shorten: says where a segment is best cut, if it has to be.
    """
    rows = best_fit([segment.length + FRAME for segment in segments], seq_len)
    return fill_holes([[segments[item] for item in row] for row in rows], seq_len, shorten)


def fill_holes(rows: list[list[Segment]], seq_len: int, shorten: Shorten) -> list[list[Segment]]:
    """Cut up the emptiest rows to fill the largest holes, until TARGET_FILL or no hole is worth it.

    Real text seldom needs it; text whose documents are all a little over half a row always does.
    """
    used = [sum(segment.length + FRAME for segment in row) for row in rows]
    holes = [(size - seq_len, row) for row, size in enumerate(used)]  # most free first
    heapq.heapify(holes)
    num_rows, num_used = len(rows), sum(used)
    while num_rows > 1 and num_used < TARGET_FILL * num_rows * seq_len:
        _, donor = heapq.heappop(holes)
        pieces, rest = _pour(rows[donor], rows, holes, shorten)
        num_used += FRAME * (pieces + len(rest) - len(rows[donor]))
        rows[donor] = rest
        if rest:
            break
        num_rows -= 1
    return [row for row in rows if row]


def _pour(
    segments: list[Segment],
    rows: list[list[Segment]],
    holes: list[tuple[int, int]],
    shorten: Shorten,
) -> tuple[int, list[Segment]]:
    """Move segments into the largest holes, cut where they must be.

    Returns:
        How many pieces were placed, and the segments that found no hole worth a piece.
    """
    pieces, rest = 0, list(segments)
    while rest and holes and -holes[0][0] >= MIN_PIECE + FRAME:
        negative_free, row = heapq.heappop(holes)
        segment = rest.pop()
        room = -negative_free - FRAME
        length = min(room, segment.length)
        if 0 < segment.length - length < MIN_PIECE:
            length = segment.length - MIN_PIECE  # leave a piece that is still worth a row's place
        if MIN_PIECE <= length < segment.length:
            length = shorten(segment, length)
        if length < MIN_PIECE and length < segment.length:
            rest.append(segment)  # no piece of it is worth this hole, which stays
            continue
        rows[row].append(segment._replace(length=length))
        pieces += 1
        heapq.heappush(holes, (negative_free + length + FRAME, row))
        if length < segment.length:
            start = segment.start + length
            rest.append(segment._replace(start=start, length=segment.length - length))
    return pieces, rest
