"""Which rows are read when and by whom: arithmetic on integers and the seed, nothing else."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order of all rows of a run. Every epoch is another permutation of blocks.

    Args:
        num_rows: rows of an epoch.
        rows_per_block: rows of every block but the last, which has the rest.
        batch_size: rows of an optimizer step, over all ranks.
        micro_batch_size: rows of one rank and forward pass.
        seed: decides the permutations.
    """

    num_rows: int
    rows_per_block: int
    batch_size: int
    micro_batch_size: int
    seed: int

    def rows(self, step: int, micro_step: int, rank: int, world_size: int) -> range:
        """The positions, in the endless stream of rows, of one forward pass of one rank.

        A rank's share of a batch is contiguous, so the batch of a step is the same rows in the same
        order for any number of ranks.

        Args:
            step: 0-based optimizer step.
            micro_step: 0-based forward pass within the step.
            rank: of `world_size`.
            world_size: ranks that share the batch.
        """
        share = self.batch_size // world_size
        start = step * self.batch_size + rank * share + micro_step * self.micro_batch_size
        return range(start, start + self.micro_batch_size)

    def locate(self, position: int) -> tuple[int, int]:
        """The block and the row within it at a position of the stream.

        The short last block moves through the epochs like the others; the rows behind it shift by
        what it lacks. Needs O(1) memory and time.
        """
        epoch, index = divmod(position, self.num_rows)
        num_blocks = -(-self.num_rows // self.rows_per_block)
        short_rows = self.num_rows - (num_blocks - 1) * self.rows_per_block
        permuted = functools.partial(_permuted, num_blocks, f"{self.seed}/{epoch}")
        before_short = permuted(num_blocks - 1, inverse=True) * self.rows_per_block
        if before_short <= index < before_short + short_rows:
            return num_blocks - 1, index - before_short
        if index >= before_short:
            index += self.rows_per_block - short_rows
        place, row = divmod(index, self.rows_per_block)
        return permuted(place), row

    def runs(self, positions: range) -> Iterator[tuple[int, range]]:
        """The blocks at positions of the stream, and the rows of each: neighbours lie together."""
        position = positions.start
        while position < positions.stop:
            block, row = self.locate(position)
            rows = min(self.rows_per_block, self.num_rows - block * self.rows_per_block)
            run = range(row, min(rows, row + positions.stop - position))
            yield block, run
            position += len(run)

    def row_ids(self, positions: range) -> Iterator[int]:
        """The rows' numbers in the order of the shards, by which a row is known."""
        for block, rows in self.runs(positions):
            first = block * self.rows_per_block
            yield from range(first + rows.start, first + rows.stop)


@functools.lru_cache(maxsize=64)  # micro-batches of a step share their blocks and epoch
def _permuted(n: int, key: str, value: int, *, inverse: bool = False) -> int:
    permutation = Permutation(n, key=key)
    return permutation.inverse(value) if inverse else permutation(value)


class Permutation:
    """A keyed permutation of range(n) in O(1) memory: a Feistel network, walked until inside.

    The network permutes the next larger power of four; a value outside of range(n) is permuted
    again until it falls inside, fewer than four times on average.
    """

    _ROUNDS = 6

    def __init__(self, n: int, *, key: str) -> None:
        self._n = n
        self._half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._keys = [f"{key}/{round_}/".encode() for round_ in range(self._ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        return self._walk(index, self._keys)

    def inverse(self, image: int) -> int:
        """What goes to `image`."""
        return self._walk(image, self._keys[::-1], inverse=True)

    def _walk(self, value: int, keys: list[bytes], *, inverse: bool = False) -> int:
        mask = (1 << self._half_bits) - 1
        while True:
            left, right = value >> self._half_bits, value & mask
            if inverse:
                left, right = right, left
            for key in keys:
                mixed = hashlib.blake2b(key + right.to_bytes(8, "little"), digest_size=8).digest()
                left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
            if inverse:
                left, right = right, left
            value = (left << self._half_bits) | right
            if value < self._n:
                return value
