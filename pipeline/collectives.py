"""Agreements between ranks. A failure on one rank becomes a value, and then everybody's failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.command import EXIT_BAD_CONFIG, EXIT_FAILED, ConfigError, ElsewhereError

T = TypeVar("T")


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather(item: T) -> list[T]:
    """Every rank's item, in rank order."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def agree(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and gather the results.

    Raises:
        The exception of `work` on the lowest rank that failed, and ElsewhereError on all others:
        the reason is printed once, and no rank waits for one that is gone.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    status = EXIT_BAD_CONFIG if isinstance(failure, ConfigError) else EXIT_FAILED
    outcomes = gather((result, None if failure is None else status))
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            if failure is not None and rank == _rank():
                raise failure
            raise ElsewhereError(failed)
    return [outcome for outcome, _ in outcomes]  # type: ignore[misc]


def on_rank_0(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 while the others wait, and give everybody its (picklable) result.

    Raises:
        As `agree` does.
    """
    return agree(lambda: work() if _rank() == 0 else None)[0]  # type: ignore[return-value]


def disconnect() -> None:
    """Leave the process group in order, after all ranks have done with it."""
    dist.barrier()
    dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
