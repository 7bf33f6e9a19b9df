"""The MPI seam: the ranks that prepare together, or one process alone where there is no MPI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

from data_prep.command import ConfigError, one_line

_LAUNCHER_MARKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "PMI_FD")


class Ranks(Protocol):
    """The ranks of one preparation."""

    rank: int
    size: int

    def allgather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""

    def abort(self, status: int) -> None:
        """End every rank with this exit status, at once."""


class _OneRank:
    rank = 0
    size = 1

    def allgather(self, item: Any) -> list[Any]:
        return [item]

    def abort(self, status: int) -> None:
        sys.stderr.flush()
        os._exit(status)


class _MpiRanks:
    def __init__(self) -> None:
        from mpi4py import MPI

        self._world = MPI.COMM_WORLD
        self.rank = self._world.Get_rank()
        self.size = self._world.Get_size()

    def allgather(self, item: Any) -> list[Any]:
        gathered: list[Any] = self._world.allgather(item)
        return gathered

    def abort(self, status: int) -> None:
        sys.stderr.flush()
        self._world.Abort(status)


def connect() -> Ranks:
    """The MPI world when an MPI launcher started this process, otherwise one rank.

    Raises:
        ConfigError: several processes were started without MPI between them, or mpi4py finds no MPI.
    """
    if not any(mark in os.environ for mark in _LAUNCHER_MARKS):
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if tasks > 1:
            raise ConfigError(
                f"srun started {tasks} tasks without MPI between them, so each would write the "
                "same shards; use `srun --mpi=pmi2` (or pmix), or mpirun"
            )
        return _OneRank()
    try:
        return _MpiRanks()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"an MPI launcher started this process but mpi4py cannot load MPI ({one_line(error)}); "
            "install one (`pip install mpich`) or run without mpirun"
        ) from error


def launched_rank() -> int:
    """This process's rank as its launcher's environment says, before MPI is loaded."""
    for mark in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if mark in os.environ:
            return int(os.environ[mark])
    return 0


def agree(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on every rank and gather the results; a failure anywhere is raised everywhere.

    Raises:
        The first failing rank's exception, on every rank, so that none waits for the others.
    """
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    outcomes = ranks.allgather((result, failure))
    for _, error in outcomes:
        if error is not None:
            raise error
    return [outcome for outcome, _ in outcomes]
