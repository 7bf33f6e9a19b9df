"""Rows to packed batches. Nothing but integers decides what is read, so nothing needs saving."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from data_prep.command import RunError
from data_prep.shards import ShardReader
from pipeline.assignment import DataOrder
from pipeline.topology import Topology

CACHED_BLOCKS = 16  # a batch spans few blocks; neighbours in a step are read again in the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows laid end to end without their padding. T tokens in all.

    Args:
        input_ids: [1, T] int64.
        positions: [1, T] int64, from 0 in each segment.
        cu_seqlens: [segments + 1] int32, on the CPU: where segments begin and end.
        first_position: place in the stream of rows; names the batch, and seeds its dropout.
        row_ids: the rows' numbers in the shards.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    first_position: int
    row_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The batch with ids and positions on `device`."""
        return dataclasses.replace(
            self, input_ids=self.input_ids.to(device), positions=self.positions.to(device)
        )


class Loader:
    """The micro-batches of a rank, for any step, in any order of asking."""

    def __init__(
        self, reader: ShardReader, topology: Topology, *, batch_size: int, micro: int, seed: int
    ) -> None:
        self._reader, self._topology = reader, topology
        blocks = reader.blocks()
        sizes = [block.rows for block in blocks]
        if set(sizes[:-1]) - {sizes[0]} or sizes[-1] > sizes[0]:
            raise RunError(
                f"{reader.url} has short blocks before its last one, so rows cannot be found by "
                "arithmetic; prepare the shards again"
            )
        self._pad_id = reader.manifest.special_ids["pad"]
        self._num_micro_steps = batch_size // (micro * topology.world_size)
        self.order = DataOrder(
            num_rows=reader.manifest.rows,
            rows_per_block=blocks[0].rows,
            batch_size=batch_size,
            micro_batch_size=micro,
            seed=seed,
        )
        self._block = functools.lru_cache(CACHED_BLOCKS)(self._read_block)

    def _read_block(
        self, index: int, language: str | None
    ) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]:
        return self._reader.read_block(index, language=language)

    def micro_batches(self, step: int) -> list[Batch]:
        """What this rank reads for a 0-based step."""
        return [
            self._batch(self.order.rows(step, m, self._topology.rank, self._topology.world_size))
            for m in range(self._num_micro_steps)
        ]

    def _batch(self, positions: range) -> Batch:
        located = [self.order.locate(position) for position in positions]
        row_ids = tuple(self.order.row_ids(positions))
        return self._assemble([(b, r, None) for b, r in located], positions.start, row_ids)

    def heldout(self, language: str) -> list[Batch]:
        """A language's held-out rows as batches of micro_batch_size, the last one shorter."""
        places = [
            (index, row, language)
            for index, block in enumerate(self._reader.blocks(language))
            for row in range(block.rows)
        ]
        size = self.order.micro_batch_size
        return [
            self._assemble(places[i : i + size], i, tuple(range(i, min(i + size, len(places)))))
            for i in range(0, len(places), size)
        ]

    def _assemble(
        self,
        places: Sequence[tuple[int, int, str | None]],
        first_position: int,
        row_ids: tuple[int, ...],
    ) -> Batch:
        ids: list[npt.NDArray[np.int64]] = []
        for block_index, row, language in places:
            block, cu_seqlens = self._block(block_index, language)
            seq_len = block.shape[1]
            bounds = cu_seqlens[
                np.searchsorted(cu_seqlens, row * seq_len) : np.searchsorted(
                    cu_seqlens, (row + 1) * seq_len, side="right"
                )
            ]
            flat = block.reshape(-1)
            ids += [
                flat[start:stop].astype(np.int64)
                for start, stop in itertools.pairwise(bounds)
                if flat[start] != self._pad_id
            ]
        lengths = np.array([len(segment) for segment in ids])
        positions = np.concatenate([np.arange(n) for n in lengths])
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(ids)).unsqueeze(0),
            positions=torch.from_numpy(positions).unsqueeze(0),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            first_position=first_position,
            row_ids=row_ids,
        )
