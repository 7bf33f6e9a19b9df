"""The MPI seam: the ranks that prepare together, or one process alone where there is no MPI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from data_prep.command import (
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    ConfigError,
    ElsewhereError,
    RunError,
    one_line,
)

_LAUNCHER_MARKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "PMI_FD")
T = TypeVar("T")

FORWARDED = 0.2  # seconds in which mpirun reads what a rank said, before it ends them all


class Ranks(Protocol):
    """The ranks of one preparation."""

    rank: int
    size: int

    def allgather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, on every rank."""

    def abort(self, status: int) -> None:
        """End every rank with this exit status, at once."""


class OneRank:
    """A process alone."""

    rank = 0
    size = 1

    def allgather(self, item: T) -> list[T]:
        """See Ranks."""
        return [item]

    def abort(self, status: int) -> None:
        """See Ranks."""
        sys.stderr.flush()
        os._exit(status)


class _MpiRanks:
    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def allgather(self, item: T) -> list[T]:
        gathered: list[T] = self._world.allgather(item)
        return gathered

    def abort(self, status: int) -> None:
        sys.stderr.flush()
        time.sleep(FORWARDED)
        self._world.Abort(status)


def connect() -> Ranks:
    """The MPI world when an MPI launcher started this process, otherwise one rank.

    Raises:
        ConfigError: several processes were started without MPI between them, or mpi4py finds no
            MPI, or not the launcher's.
    """
    if not any(mark in os.environ for mark in _LAUNCHER_MARKS):
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise ConfigError(
                f"srun started {tasks} tasks without MPI between them, so each would write the "
                "same shards; use `srun --mpi=pmi2` (or pmix), or mpirun"
            )
        return OneRank()
    try:
        ranks = _MpiRanks()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"an MPI launcher started this process but mpi4py cannot load MPI ({one_line(error)}); "
            "install one (`pip install mpich`) or run without mpirun"
        ) from error
    launched = os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    if launched is not None and int(launched) != ranks.size:
        raise ConfigError(
            f"the launcher started {launched} processes but mpi4py's MPI sees {ranks.size}, so "
            "each would write the same shards; use the mpirun of the MPI that mpi4py loads"
        )
    return ranks


def launched_rank() -> int:
    """This process's rank as its launcher's environment says, before MPI is loaded."""
    for mark in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if mark in os.environ:
            return int(os.environ[mark])
    return 0


def each(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do `work` on every rank, each for itself; a failure anywhere is everybody's.

    Raises:
        ConfigError or RunError: on rank 0, what the lowest failing rank raised, so that it is said
            once. An OSError becomes a RunError; anything else is a bug and is not caught.
        ElsewhereError: on all other ranks.
    """
    failure: ConfigError | RunError | None = None
    try:
        result = work()
    except (ConfigError, RunError) as error:
        failure = error
    except OSError as error:
        failure = RunError(str(error))
    for reason in ranks.allgather(failure):
        if reason is not None:
            if ranks.rank == 0:
                raise reason
            is_config = isinstance(reason, ConfigError)
            raise ElsewhereError(EXIT_BAD_CONFIG if is_config else EXIT_FAILED)
    return result


def agree(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and gather the results; fails as `each` does."""
    return ranks.allgather(each(ranks, work))


def on_rank_0(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Do `work` on rank 0 while the others wait, and give all its result; fails as `each` does."""
    return agree(ranks, lambda: work() if ranks.rank == 0 else None)[0]
