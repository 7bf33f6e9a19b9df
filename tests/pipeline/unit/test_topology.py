from __future__ import annotations

import os

import pytest

from data_prep.command import ConfigError
from pipeline import topology
from pipeline.topology import Topology, launched_rank, take_rank

SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "MASTER_ADDR": "node-1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process's environment: this, and nothing else."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def test_one_rank_alone(environment: dict[str, str]) -> None:
    assert Topology.from_environment() == Topology(
        rank=0, world_size=1, local_rank=0, local_world_size=1
    )
    assert launched_rank() == 0
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environment["MASTER_PORT"]) < 65536


def test_two_runs_alone_do_not_meet_at_a_port(environment: dict[str, str]) -> None:
    ports = set()
    for _ in range(5):
        environment.clear()
        Topology.from_environment()
        ports.add(environment["MASTER_PORT"])
    assert len(ports) > 1


@pytest.mark.parametrize("local_size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_deepspeed_and_torchrun(local_size: str, environment: dict[str, str]) -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", local_size: "2"}
    launched |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    environment.update(launched)
    assert Topology.from_environment() == Topology(
        rank=3, world_size=4, local_rank=1, local_world_size=2
    )
    assert environment.items() >= launched.items()
    assert launched_rank() == 3


def test_srun(environment: dict[str, str]) -> None:
    environment.update(SRUN)
    assert launched_rank() == 5
    assert Topology.from_environment() == Topology(
        rank=5, world_size=8, local_rank=1, local_world_size=4
    )
    assert environment["RANK"] == "5"
    assert environment["WORLD_SIZE"] == "8"
    assert environment["LOCAL_RANK"] == "1"
    assert environment["MASTER_ADDR"] == "node-1"
    assert environment["MASTER_PORT"] == "29500"  # all ranks must come to the same one


@pytest.mark.parametrize(("visible", "local_rank"), [("2", 0), ("0,1,2,3", 1), ("", 1), (None, 1)])
def test_a_gpu_that_srun_bound_is_the_tasks_number_0(
    visible: str | None, local_rank: int, environment: dict[str, str]
) -> None:
    environment.update(SRUN)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    assert Topology.from_environment().local_rank == local_rank
    assert environment["LOCAL_RANK"] == str(local_rank)


def test_a_launcher_within_a_job_is_the_launcher(environment: dict[str, str]) -> None:
    environment.update(SRUN, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert Topology.from_environment() == Topology(
        rank=1, world_size=2, local_rank=1, local_world_size=2
    )
    assert launched_rank() == 1


def test_a_single_task_of_srun_is_one_rank_alone(environment: dict[str, str]) -> None:
    environment.update(SRUN, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")
    del environment["MASTER_ADDR"]
    assert Topology.from_environment() == Topology(
        rank=0, world_size=1, local_rank=0, local_world_size=1
    )


def test_tasks_that_cannot_find_each_other_are_refused(environment: dict[str, str]) -> None:
    environment.update(SRUN)
    del environment["MASTER_ADDR"]
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set.*distill_xlmr\.sbatch"):
        Topology.from_environment()


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(8, 1, 8), (8, 2, 4), (7, 2, 3), (2, 4, 1)]
)
def test_threads_are_a_fair_share_of_the_cores(
    cores: int, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    topology = Topology(rank=0, world_size=ranks, local_rank=0, local_world_size=ranks)
    assert topology.threads == threads


CORES = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1), 4: (0, 0), 5: (0, 1), 6: (1, 0), 7: (1, 1)}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Two sockets of two cores of two threads, numbered as Linux does; what a rank may use."""
    state = {"affinity": set(CORES)}
    monkeypatch.setattr(os, "cpu_count", lambda: len(CORES))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: state["affinity"])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: state.update(affinity=cpus))
    monkeypatch.setattr(topology, "_core_of", lambda cpu: (*CORES[cpu], cpu))
    return state


def rank_of_host(local_rank: int, ranks: int) -> Topology:
    return Topology(
        rank=local_rank, world_size=ranks, local_rank=local_rank, local_world_size=ranks
    )


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [(2, [{0, 4, 1, 5}, {2, 6, 3, 7}]), (4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]), (8, None)],
)
def test_ranks_share_whole_cores(ranks: int, shares, host: dict[str, set[int]]) -> None:
    found = [rank_of_host(rank, ranks).cpus for rank in range(ranks)]
    assert shares is None or found == shares
    assert set.union(*found) == set(CORES)
    assert sum(map(len, found)) == len(CORES)


def test_more_ranks_than_processors_share_them(host: dict[str, set[int]]) -> None:
    assert all(rank_of_host(rank, 12).cpus for rank in range(12))


def test_a_rank_is_pinned_only_where_nobody_else_has_done_so(host: dict[str, set[int]]) -> None:
    rank_of_host(0, 1).pin()
    assert host["affinity"] == set(CORES)
    rank_of_host(1, 2).pin()
    assert host["affinity"] == {2, 3, 6, 7}
    rank_of_host(0, 2).pin()  # as inside a scheduler's own binding
    assert host["affinity"] == {2, 3, 6, 7}


def test_processors_of_this_host_have_a_place() -> None:
    places = [topology._core_of(cpu) for cpu in sorted(os.sched_getaffinity(0))]
    assert len(set(places)) == len(places)
    assert topology._core_of(10**6) == (0, 10**6, 10**6)


@pytest.mark.parametrize(
    ("variables", "place", "gpu"),
    [
        ({}, (0, 1), "0"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4), "1"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "2"}, (2, 3), "2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,7"},
         (1, 2), "7"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1",
          "CUDA_VISIBLE_DEVICES": "5"}, (1, 2), "5"),
        ({"CUDA_VISIBLE_DEVICES": ""}, (0, 1), ""),
    ],
)  # fmt: skip
def test_independent_processes_know_their_place_and_libraries_do_not(
    variables: dict[str, str],
    place: tuple[int, int],
    gpu: str,
    environment: dict[str, str],
) -> None:
    environment |= {"MASTER_ADDR": "here", **variables}
    assert take_rank() == place
    assert not {name for name in environment if "RANK" in name or "WORLD" in name}
    assert "MASTER_ADDR" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == gpu
