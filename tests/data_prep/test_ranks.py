from __future__ import annotations

import re

import pytest

from data_prep import ranks as ranks_module
from data_prep.command import ConfigError, ElsewhereError, RunError
from data_prep.ranks import OneRank, agree, connect, each, launched_rank, on_rank_0

MARKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "PMI_FD", "PMI_SIZE",
         "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")  # fmt: skip


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for mark in MARKS:
        monkeypatch.delenv(mark, raising=False)
    return monkeypatch


def fail_with(error: Exception, *, rank: int):
    def work(ranks):
        def attempt() -> int:
            if ranks.rank == rank:
                raise error
            return ranks.rank

        return each(ranks, attempt)

    return work


def test_each_keeps_the_result_and_agree_gathers_it(on_ranks) -> None:
    assert on_ranks(3, lambda ranks: each(ranks, lambda: ranks.rank)) == [0, 1, 2]
    assert on_ranks(3, lambda ranks: agree(ranks, lambda: ranks.rank)) == [[0, 1, 2]] * 3


def test_on_rank_0_works_once_and_gives_everybody_its_result(on_ranks) -> None:
    worked: list[int] = []

    def work(ranks):
        return on_rank_0(ranks, lambda: worked.append(ranks.rank) or "result")

    assert on_ranks(3, work) == ["result"] * 3
    assert worked == [0]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (ConfigError("because"), ConfigError, 2),
        (RunError("because"), RunError, 1),
        (OSError(28, "because"), RunError, 1),
    ],
)
def test_one_ranks_failure_is_said_by_rank_0_and_ends_all(
    on_ranks, rank: int, error: Exception, kind: type[Exception], status: int
) -> None:
    first, *others = on_ranks(3, fail_with(error, rank=rank))
    assert type(first) is kind
    assert "because" in str(first)
    assert [type(other) for other in others] == [ElsewhereError] * 2
    assert [other.status for other in others] == [status] * 2


def test_a_bug_is_not_turned_into_an_agreement() -> None:
    with pytest.raises(ZeroDivisionError):
        each(OneRank(), lambda: 1 // 0)


def test_without_a_launcher_there_is_one_rank(no_launcher) -> None:
    ranks = connect()
    assert (ranks.rank, ranks.size, ranks.allgather("item")) == (0, 1, ["item"])


def test_srun_without_mpi_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match="srun started 4 tasks without MPI"):
        connect()


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_another_mpis_launcher_is_refused(no_launcher: pytest.MonkeyPatch, variable: str) -> None:
    no_launcher.setenv("OMPI_COMM_WORLD_RANK", "1")
    no_launcher.setenv(variable, "2")
    no_launcher.setattr(ranks_module, "_MpiRanks", OneRank)  # each process is a world of its own
    with pytest.raises(ConfigError, match=r"started 2 processes .* sees 1"):
        connect()


def test_a_launcher_without_mpi_behind_mpi4py_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("cannot load MPI library")

    no_launcher.setenv("PMI_RANK", "0")
    no_launcher.setattr(ranks_module, "_MpiRanks", fail)
    with pytest.raises(ConfigError, match=re.escape("cannot load MPI library")):
        connect()


@pytest.mark.parametrize(
    ("variables", "rank"),
    [({}, 0), ({"PMI_RANK": "3"}, 3), ({"SLURM_PROCID": "2"}, 2), ({"PMIX_RANK": "1"}, 1)],
)
def test_launched_rank_reads_the_launchers_environment(
    no_launcher: pytest.MonkeyPatch, variables: dict[str, str], rank: int
) -> None:
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert launched_rank() == rank
