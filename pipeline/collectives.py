"""Agreements between ranks. A failure on one rank becomes a value, and then everybody's failure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_prep.command import (
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    ConfigError,
    ElsewhereError,
    RunError,
    one_line,
)

T = TypeVar("T")


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def copy_from_rank_0(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Overwrite tensors with rank 0's, one at a time.

    Args:
        tensors: of equal shapes, dtypes and order on every rank, anywhere.
        device: that the ranks exchange tensors by.
    """
    if dist.is_initialized():
        for tensor in tensors:
            sent = tensor.to(device).contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


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
        ConfigError or RunError: what `work` refused on the lowest rank that failed; rank 0 raises
            it, whichever rank it was, since rank 0 speaks for all.
        ElsewhereError: on all other ranks, so that the reason is printed once and no rank waits
            for one that is gone.
        Exception: a bug, on the rank that has it.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    explained = failure if isinstance(failure, ConfigError | RunError) else None
    outcomes = gather((result, failure is not None, explained))
    for rank, (_, failed, reason) in enumerate(outcomes):
        if not failed:
            continue
        if reason is not None and _rank() == 0:
            raise reason
        if reason is None and rank == _rank() and failure is not None:
            raise failure
        raise ElsewhereError(EXIT_BAD_CONFIG if isinstance(reason, ConfigError) else EXIT_FAILED)
    return [outcome for outcome, _, _ in outcomes]  # type: ignore[misc]


def on_rank_0(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 while the others wait, and give everybody its (picklable) result.

    Raises:
        As `agree` does.
    """
    return agree(lambda: work() if _rank() == 0 else None)[0]  # type: ignore[return-value]


@contextlib.contextmanager
def naming_lost_ranks(rank: int) -> Iterator[None]:
    """Turn a broken connection between ranks into one line.

    Raises:
        RunError: another rank is gone, or the ranks could not meet.
    """
    try:
        yield
    except (ConfigError, RunError, ElsewhereError):
        raise
    except RuntimeError as error:
        reason = one_line(error)
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", reason):
            raise
        raise RunError(
            f"rank {rank} lost its connection to the other ranks ({reason}); if one of them ended, "
            "its own message says why, and the same command goes on from the last checkpoint; if "
            "the port is taken by another job, use deepspeed --master_port N"
        ) from error


def disconnect() -> None:
    """Leave the process group in order, after all ranks have done with it."""
    dist.barrier()
    dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
