"""Segments into rows: best fit, then the emptiest rows are cut up to fill the others' holes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

FRAME = 2  # every segment carries one token before its content and one after
TARGET_FILL = 0.995  # documents are cut only as far as this needs
MIN_PIECE = 3  # tokens of content in a piece that is cut off to fill a hole


class Segment(NamedTuple):
    """`length` tokens of document `document` from its token `start`; FRAME is not counted."""

    document: int
    start: int
    length: int


def cut(document: int, num_tokens: int, seq_len: int) -> list[Segment]:
    """A document as segments that each fit a row."""
    longest = seq_len - FRAME
    return [
        Segment(document, start, min(longest, num_tokens - start))
        for start in range(0, num_tokens, longest)
    ]


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
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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


def pack(segments: Sequence[Segment], seq_len: int) -> list[list[Segment]]:
    """Rows of at most `seq_len` tokens that hold every token of every segment exactly once."""
    rows = best_fit([segment.length + FRAME for segment in segments], seq_len)
    return fill_holes([[segments[item] for item in row] for row in rows], seq_len)


def fill_holes(rows: list[list[Segment]], seq_len: int) -> list[list[Segment]]:
    """Cut up the emptiest rows to fill the largest holes, until TARGET_FILL or no hole is worth it.

    Real text seldom needs it; text whose documents are all a little over half a row always does.
    """
    used = [sum(segment.length + FRAME for segment in row) for row in rows]
    holes = [(size - seq_len, row) for row, size in enumerate(used)]  # most free first
    heapq.heapify(holes)
    num_rows, num_used = len(rows), sum(used)
    while num_rows > 1 and num_used < TARGET_FILL * num_rows * seq_len:
        _, donor = heapq.heappop(holes)
        pieces, rest = _pour(rows[donor], rows, holes)
        num_used += FRAME * (pieces + len(rest) - len(rows[donor]))
        rows[donor] = rest
        if rest:
            break
        num_rows -= 1
    return [row for row in rows if row]


def _pour(
    segments: list[Segment], rows: list[list[Segment]], holes: list[tuple[int, int]]
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
