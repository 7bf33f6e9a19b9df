"""The last stage: rows of segments to blocks of ids, as WebDataset's writer takes them."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.container import Container
from data_prep.pack import FRAME
from data_prep.plan import Rows
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TokenFiles


class RowFiles:
    """The rows of several files, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        counts = [len(Container(path).read("starts")) - 1 for path in paths]
        self._bounds = np.cumsum([0, *counts]).tolist()
        self._load = functools.lru_cache(2)(lambda index: Rows.load(Container(self._paths[index])))

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def slice(self, start: int, stop: int) -> Rows:
        """The rows [start, stop)."""
        parts, row = [], start
        while row < stop:
            index = bisect.bisect_right(self._bounds, row) - 1
            rows, base = self._load(index), self._bounds[index]
            end = min(stop, self._bounds[index + 1])
            parts.append((rows, row - base, end - base))
            row = end
        segments = [rows.segments[rows.starts[a] : rows.starts[b]] for rows, a, b in parts]
        counts = [np.diff(rows.starts[a : b + 1]) for rows, a, b in parts]
        return Rows(np.concatenate(segments), np.cumsum(np.concatenate([[0], *counts])))


def block_sample(
    key: str, rows: Rows, files: TokenFiles, tokenizer: Tokenizer, seq_len: int
) -> dict[str, Any]:
    """One block.

    Args:
        key: the sample's name.
        rows: what is in it.
        files: where the ids are.
        tokenizer: whose frame and padding it has.
        seq_len: tokens of a row.
    """
    segments, num_rows = rows.segments, len(rows)
    framed = segments["length"].astype(np.int64) + FRAME
    row = np.repeat(np.arange(num_rows), np.diff(rows.starts))
    ends_before = np.cumsum(framed) - framed
    first = ends_before[rows.starts[:-1]]  # no row is empty
    begins = row * seq_len + ends_before - first[row]
    ends = begins + framed
    input_ids = np.full(num_rows * seq_len, tokenizer.pad_id, dtype=tokenizer.dtype)
    input_ids[begins] = tokenizer.cls_id
    input_ids[ends - 1] = tokenizer.sep_id
    _copy_content(input_ids, segments, begins + 1, files)
    edges = np.arange(num_rows + 1) * seq_len
    cu_seqlens = np.union1d(edges, np.concatenate([begins, ends]))
    names: list[str | None] = [None] * (len(cu_seqlens) - 1)
    languages = segments["language"].tolist()
    for place, language in zip(
        np.searchsorted(cu_seqlens, begins).tolist(), languages, strict=True
    ):
        names[place] = files.languages[language]
    tokens = np.bincount(segments["language"], weights=framed)
    return {
        "__key__": key,
        "input_ids.npy": input_ids.reshape(num_rows, seq_len),
        "cu_seqlens.npy": cu_seqlens.astype(np.int32),
        "json": {
            "rows": num_rows,
            "tokens": {files.languages[i]: int(n) for i, n in enumerate(tokens.tolist()) if n},
            "padding": len(input_ids) - int(framed.sum()),
            "segment_languages": names,
        },
    }


def _copy_content(
    input_ids: npt.NDArray[Any],
    segments: npt.NDArray[np.void],
    places: npt.NDArray[np.int64],
    files: TokenFiles,
) -> None:
    """Each segment's ids to its place, all those of a partition at once."""
    for partition in np.unique(segments["partition"]).tolist():
        here = segments["partition"] == partition
        lengths = segments["length"][here].astype(np.int64)
        steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(segments["offset"][here].astype(np.int64), lengths) + steps
        target = np.repeat(places[here], lengths) + steps
        input_ids[target] = files.tokens(partition)[source]
