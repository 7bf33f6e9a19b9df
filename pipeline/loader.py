"""Rows to packed batches. Nothing but integers decides what is read, so nothing needs saving."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from data_prep.block_cache import BlockCache
from data_prep.command import RunError
from data_prep.shards import ShardReader
from pipeline.assignment import DataOrder
from pipeline.config import Recipe
from pipeline.masking import Masking
from pipeline.progress import part
from pipeline.topology import Topology

CACHED_BLOCKS = 16  # a batch spans few blocks; neighbours in a step are read again in the next
# A read from remote storage takes a tenth of a second or more, most of which is waiting.
BLOCKS_AHEAD = 8
STEPS_AHEAD = 16  # where steps are small, looking further costs more time than it saves
READS_AT_ONCE = 16
EXIT_PATIENCE = 5.0  # seconds that an exit leaves to a read that nobody waits for any more


_Block: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[np.int32]]
_Read = TypeVar("_Read")


class Count(NamedTuple):
    """How many tokens there are, and how many of them are masked."""

    tokens: int
    masked: int

    @classmethod
    def sum(cls, counts: Iterable[Count]) -> Count:
        """Of several batches, or ranks."""
        tokens, masked = zip(*counts, strict=True)
        return cls(sum(tokens), sum(masked))


class Masked(NamedTuple):
    """The tokens that are to be predicted.

    Args:
        places: [M] int64: which of the T tokens.
        labels: [M] int64: the ids that stood there.
    """

    places: torch.Tensor
    labels: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows laid end to end without their padding. T tokens in all.

    Args:
        input_ids: [1, T] int64.
        positions: [1, T] int64, from 0 in each segment.
        cu_seqlens: [segments + 1] int32: where segments begin and end.
        max_seqlen: tokens of a row, which no segment exceeds; the same for all batches.
        first_position: place in the stream of rows; names the batch, and seeds its dropout.
        row_ids: the rows' numbers in the shards.
        masked: what is to be predicted, where the objective has that; input_ids are masked then.
        shape: tokens that models are given, so that all batches have one shape; None is T.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    first_position: int
    row_ids: tuple[int, ...]
    masked: Masked | None = None
    shape: int | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def count(self) -> Count:
        """T and M."""
        return Count(self.num_tokens, 0 if self.masked is None else len(self.masked.places))

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a model's forward pass takes, in its order."""
        packed = (*self._in_shape(), self.max_seqlen)
        return packed if self.masked is None else (*packed, self.masked.places)

    def _in_shape(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, positions and segments, filled up to `shape` with segments that nobody looks at."""
        missing = 0 if self.shape is None else self.shape - self.num_tokens
        if not missing:
            return self.input_ids, self.positions, self.cu_seqlens
        place = torch.arange(missing, device=self.positions.device)[None]
        number = torch.arange(1, -(-missing // self.max_seqlen) + 1, device=self.cu_seqlens.device)
        ends = self.num_tokens + (number * self.max_seqlen).clamp(max=missing)
        return (
            pad(self.input_ids, (0, missing)),
            torch.cat([self.positions, place % self.max_seqlen], dim=1),
            torch.cat([self.cu_seqlens, ends.to(self.cu_seqlens.dtype)]),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory without waiting."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in memory from which a GPU copies by itself."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            input_ids=function(self.input_ids),
            positions=function(self.positions),
            cu_seqlens=function(self.cu_seqlens),
            masked=None if self.masked is None else Masked(*map(function, self.masked)),
        )


def open_shards(recipe: Recipe, digest: str | None = None) -> ShardReader:
    """The recipe's shards, read as its `data` section says.

    Args:
        recipe: names them.
        digest: of the manifest to read by; None is the newest.

    Raises:
        ConfigError: they are not there, or data.cache_dir cannot be written.
        RunError: the manifest is damaged, or a shard is missing or cut.
    """
    data = recipe.data
    cache = BlockCache(Path(data.cache_dir), int(data.cache_gb * 1e9)) if data.cache_dir else None
    return ShardReader(recipe.shards, digest, verify=data.verify, cache=cache)


class Loader:
    """The micro-batches of a rank, for any step, in any order of asking.

    While a step is trained on, a thread reads the next one. From remote storage the next blocks
    come at the same time, each by a thread of its own.

    Args:
        reader: of the shards.
        topology: whose rank reads.
        batch_size: rows of a step, over all ranks.
        micro: rows of a micro-batch.
        seed: of the order of rows.
        masking: of tokens that are to be predicted; None leaves the text as it is.
        one_shape: let models be given as many tokens of every micro-batch as it has places.
    """

    def __init__(
        self,
        reader: ShardReader,
        topology: Topology,
        *,
        batch_size: int,
        micro: int,
        seed: int,
        masking: Masking | None = None,
        one_shape: bool = False,
    ) -> None:
        self._reader, self._topology, self._masking = reader, topology, masking
        self._shape = micro * reader.manifest.seq_len if one_shape else None
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
        self._ahead: _Ahead[list[Batch]] | None = None
        self._blocks_ahead: dict[int, _Ahead[_Block]] = {}
        self._may_read = threading.Semaphore(READS_AT_ONCE)

    def _read_block(self, index: int, language: str | None) -> _Block:
        ahead = self._blocks_ahead.get(index) if language is None else None
        block = ahead.take(index) if ahead is not None else None
        return block or self._reader.read_block(index, language=language)

    def _fetch(self, step: int) -> None:
        """Begin to read what this rank needs from a step on: all of the step, and some more."""
        wanted: dict[int, None] = {}  # a set that keeps the order
        for coming in range(step, step + STEPS_AHEAD):
            wanted |= dict.fromkeys(block for block, _ in self.order.runs(self._share(coming)))
            if len(wanted) >= BLOCKS_AHEAD:
                break
        # All other reads are forgotten: of past blocks, and of blocks of which nobody comes.
        self._blocks_ahead = {
            index: self._blocks_ahead.get(index) or _Ahead("block", self._read_ahead, index)
            for index in wanted
        }

    def _read_ahead(self, index: int) -> _Block:
        with self._may_read:
            return self._reader.read_block(index)

    def _share(self, step: int) -> range:
        """This rank's part of a step in the stream of rows."""
        rank, world_size = self._topology.rank, self._topology.world_size
        first = self.order.rows(step, 0, rank, world_size)
        return range(first.start, first.start + self.order.batch_size // world_size)

    @part("data")
    def micro_batches(self, step: int) -> list[Batch]:
        """What this rank reads for a 0-based step.

        Raises:
            RunError: a shard is damaged where this step reads it.
        """
        batches = self._ahead.take(step) if self._ahead is not None else None
        if batches is None:
            batches = self._read_step(step)
        self._ahead = _Ahead("step", self._read_step, step + 1)
        return batches

    def _read_step(self, step: int) -> list[Batch]:
        if self._reader.is_remote:
            self._fetch(step)
        batches = [
            self.micro_batch(step, micro_step, self._topology.rank)
            for micro_step in range(self._num_micro_steps)
        ]
        return [b.pinned() for b in batches] if torch.cuda.is_available() else batches

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Batch:
        """Any rank's micro-batch of any 0-based step."""
        positions = self.order.rows(step, micro_step, rank, self._topology.world_size)
        row_ids = tuple(self.order.row_ids(positions))
        return self._assemble(self.order.runs(positions), None, positions.start, row_ids)

    def heldout(self, language: str) -> list[Batch]:
        """A language's held-out rows as batches of micro_batch_size, the last one shorter."""
        rows = [
            (index, range(row, row + 1))
            for index, block in enumerate(self._reader.blocks(language))
            for row in range(block.rows)
        ]
        size = self.order.micro_batch_size
        return [
            self._assemble(rows[i : i + size], language, i, tuple(range(len(rows))[i : i + size]))
            for i in range(0, len(rows), size)
        ]

    def _assemble(
        self,
        runs: Iterable[tuple[int, range]],
        language: str | None,
        first_position: int,
        row_ids: tuple[int, ...],
    ) -> Batch:
        parts = [self._read_rows(block, rows, language) for block, rows in runs]
        ids = np.concatenate([part_ids for part_ids, _ in parts])
        lengths = np.concatenate([part_lengths for _, part_lengths in parts])
        is_text = ids[np.cumsum(lengths) - lengths] != self._pad_id
        keep, lengths = np.repeat(is_text, lengths), lengths[is_text]
        ids, masked = self._mask(ids.astype(np.int64), keep, first_position, language)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], lengths)
        return Batch(
            input_ids=torch.from_numpy(ids).unsqueeze(0),
            positions=torch.from_numpy(positions).unsqueeze(0),
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=self._reader.manifest.seq_len,
            first_position=first_position,
            row_ids=row_ids,
            masked=masked,
            shape=self._shape,
        )

    def _mask(
        self,
        ids: npt.NDArray[np.int64],
        keep: npt.NDArray[np.bool_],
        first_position: int,
        language: str | None,
    ) -> tuple[npt.NDArray[np.int64], Masked | None]:
        """The ids that are kept, masked where that is asked for, and what is to be predicted."""
        if self._masking is None:
            return ids[keep], None
        first = first_position * self._reader.manifest.seq_len
        stream = "train" if language is None else f"heldout/{language}"
        shown, is_chosen = self._masking(ids, first, stream)
        places = np.flatnonzero(is_chosen[keep])
        labels = torch.from_numpy(ids[keep][places])
        return shown[keep], Masked(torch.from_numpy(places), labels)

    def _read_rows(
        self, index: int, rows: range, language: str | None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Rows that lie together: their ids [tokens] and their segments' lengths, with padding."""
        block, cu_seqlens = self._block(index, language)
        edges = np.array([rows.start, rows.stop]) * block.shape[1]
        first, last = np.searchsorted(cu_seqlens, edges)
        return block[rows.start : rows.stop].reshape(-1), np.diff(cu_seqlens[first : last + 1])


class _Ahead(threading.Thread, Generic[_Read]):
    """A step or a block that is read before it is asked for.

    What goes wrong is kept for whoever asks for the data, so that it ends a run where it would
    without a thread. A thread is not there any more in a fork, which reads by itself.
    """

    def __init__(self, what: str, read: Callable[[int], _Read], number: int) -> None:
        super().__init__(name=f"read-{what}-{number}", daemon=True)
        self._read, self._number = read, number
        self._data: _Read | None = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Read, in the thread."""
        try:
            self._data = self._read(self._number)
        except Exception as error:
            self._error = error

    def take(self, number: int) -> _Read | None:
        """The data, once they are read; None if there are none, or of another number.

        Raises:
            Exception: what the read raised.
        """
        self.join()
        if number != self._number:
            return None
        if self._error is not None:
            raise self._error
        return self._data


@atexit.register
def _let_reads_end() -> None:
    """Exit under a read only where it hangs: libraries may abort when stopped in the middle."""
    for thread in threading.enumerate():
        if isinstance(thread, _Ahead):
            thread.join(EXIT_PATIENCE)
