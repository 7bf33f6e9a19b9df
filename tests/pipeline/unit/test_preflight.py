"""Findings from facts of several nodes, and the command on two ranks."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import preflight
from pipeline.config import load_recipe
from pipeline.preflight import (
    CHECKPOINT_BYTES,
    Facts,
    Meeting,
    checkpoint_bytes,
    findings,
    gpu_faults,
    look_at_folder,
    product,
    ring_rounds,
)
from tests.pipeline.launch import ROOT, environment, free_port

SOFTWARE = {"python": "3.11.2", "torch": "2.13.0", "commit": "c0ffee"}
GIB = 1 << 30


def cluster() -> list[Facts]:
    """Four nodes of two ranks that nothing is wrong with."""
    return [
        Facts(
            rank=rank,
            node=f"n{rank // 2}",
            software=dict(SOFTWARE),
            num_gpus=2,
            gpu="H100",
            gpu_bytes=80 * GIB,
            gpu_bytes_free=79 * GIB,
            inputs={"shards/manifest.json": "digest"},
            disk_bytes_free=100 * GIB,
            clock_s=0.001 * rank,
            product_rate=400e12 + rank,
            link_rate=20e9 if rank % 2 == 0 else None,
        )
        for rank in range(8)
    ]


def found(ranks: list[Facts], disk_bytes: int = GIB) -> list[str]:
    return findings(ranks, output_dir="runs/x", disk_bytes=disk_bytes)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(cluster()) == []
    assert found(cluster()[:1]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"software": SOFTWARE | {"torch": "2.12.1"}}, "torch 2.12.1, where most have 2.13.0"),
        ({"software": SOFTWARE | {"commit": None}}, "commit None, where most have c0ffee"),
        ({"num_gpus": 1}, "GPUs for a rank to see: 1, where most have 2"),
        ({"gpu": "A100"}, "GPU A100, where most have H100"),
        ({"gpu_bytes_free": 60 * GIB}, "21.5 of 85.9 GB of rank 4's GPU are taken already"),
        ({"faults": ["rank 4's matrix product is wrong"]}, "rank 4's matrix product is wrong"),
        ({"inputs": {"shards/manifest.json": None}}, "shards/manifest.json is not there"),
        ({"inputs": {"shards/manifest.json": "other"}}, "is another file than on n0"),
        ({"unseen": [0]}, "output_dir=runs/x is not the folder that n0 has under this name"),
        ({"clock_s": 61.0}, "its clock is 61 s ahead of the others'"),
        ({"clock_s": -61.0}, "its clock is 61 s behind the others'"),
        ({"disk_bytes_free": GIB - 1}, "1.1 GB are free in output_dir=runs/x"),
        ({"product_rate": 100e12}, "slow matrix products, 100000.00 G/s where the median is 4000"),
        ({"link_rate": 2e9}, "slow network, 2.00 GB/s where the median is 20.00"),
    ],
)
def test_a_node_that_differs_is_named_in_one_line(change: dict[str, object], said: str) -> None:
    ranks = cluster()
    ranks[4] = dataclasses.replace(ranks[4], **change)
    (line,) = found(ranks)
    assert line.startswith("node n2: ")
    assert said in line


def test_what_all_ranks_of_a_node_find_is_said_once() -> None:
    ranks = cluster()
    for rank in (2, 3):
        ranks[rank].software["torch"] = "2.12.1"
        ranks[rank].clock_s = 7.0
        ranks[rank].unseen = [0]
    ranks[0].unseen = [2, 3]
    lines = found(ranks)
    assert len(lines) == 3
    assert all(line.startswith("node n1: ") for line in lines)


def test_the_first_node_is_wrong_where_the_others_agree() -> None:
    ranks = cluster()
    for rank in (0, 1):
        ranks[rank].software["torch"] = "2.12.1"
        ranks[rank].clock_s -= 100
    lines = found(ranks)
    assert len(lines) == 2
    assert all(line.startswith("node n0: ") for line in lines)


def test_of_two_nodes_none_is_called_slow() -> None:
    ranks = cluster()[:4]
    ranks[2].product_rate = ranks[2].link_rate = 1.0
    assert found(ranks) == []


@pytest.mark.parametrize("leaders", [[0, 1], [0, 2, 4], [0, 8, 16, 24], list(range(7))])
def test_a_slow_node_is_told_from_its_neighbours(leaders: list[int]) -> None:
    rounds = ring_rounds(leaders)
    links = [pair for pairs in rounds for pair in pairs]
    neighbours = [{a for link in links if b in link for a in link} - {b} for b in leaders]
    assert all(len(some) == min(2, len(leaders) - 1) for some in neighbours)
    assert len(set(links)) == len(links)
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(set(busy)) == len(busy), "a rank has one partner at a time"


# As nvidia-smi 575 writes it, shortened.
SMI = """<?xml version="1.0" ?>
<nvidia_smi_log><gpu id="00000000:1B:00.0">
  <gpu_reset_status><reset_required>No</reset_required></gpu_reset_status>
  <gpu_recovery_action>None</gpu_recovery_action>
  <ecc_errors>
    <volatile>
      <sram_correctable>7</sram_correctable>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <dram_uncorrectable>0</dram_uncorrectable>
    </volatile>
    <aggregate><dram_uncorrectable>3</dram_uncorrectable></aggregate>
  </ecc_errors>
  <remapped_rows>
    <remapped_row_pending>No</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
</gpu></nvidia_smi_log>"""


@pytest.mark.parametrize(
    ("healthy", "failing", "said"),
    [
        ("<dram_uncorrectable>0<", "<dram_uncorrectable>2<", "dram_uncorrectable 2"),
        ("parity>0<", "parity>1<", "sram_uncorrectable_parity 1"),
        ("pending>No<", "pending>Yes<", "remapped_row_pending"),
        ("required>No<", "required>Yes<", "reset_required"),
        ("action>None<", "action>Drain and Reset<", "(Drain and Reset)"),
    ],
)
def test_what_nvidia_smi_says_is_repeated(healthy: str, failing: str, said: str) -> None:
    assert gpu_faults(None) == gpu_faults(SMI) == []
    assert gpu_faults(SMI.replace("<dram_uncorrectable>0<", "<dram_uncorrectable>N/A<")) == []
    (fault,) = gpu_faults(SMI.replace(healthy, failing))
    assert fault.startswith("GPU 00000000:1B:00.0: ")
    assert said in fault


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_right_and_one_wrong_bit_is_seen(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(preflight, "CPU_SIZE", 64)
    is_right, rate = product(torch.device("cpu"), dtype)
    assert is_right
    assert rate > 0
    multiply = torch.Tensor.__matmul__

    def broken(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = multiply(left, right)
        if result.dtype == dtype:
            result[3, 5] = torch.nextafter(result[3, 5], torch.tensor(1e9, dtype=dtype))
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert not product(torch.device("cpu"), dtype)[0]


class Board(Meeting):
    """A meeting of one process, which answers for the other ranks."""

    def __init__(self, world_size: int, when_written: Callable[[], object]) -> None:
        self.topology = None  # type: ignore[assignment]
        self._world_size, self._when_written = world_size, when_written

    def collect(self, name: str, item: object) -> list[object]:
        if name == "written":
            self._when_written()
        return [item] * self._world_size

    def announce(self, name: str, item: object) -> object:
        return item


def test_ranks_that_do_not_share_the_folder_are_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "SEEN_WITHIN_S", 0.2)

    def others() -> None:
        (folder,) = tmp_path.glob("run/.preflight-*")
        (folder / "2").touch()

    facts = Facts(rank=0, node="n0")
    look_at_folder(facts, tmp_path / "run", Board(4, others))
    assert facts.unseen == [1, 3]
    assert facts.disk_bytes_free
    assert os.listdir(tmp_path / "run") == [], "nothing is left"


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = Facts(rank=0, node="n0")
    look_at_folder(facts, tmp_path / "file", Board(1, lambda: None))
    (fault,) = facts.faults
    assert "cannot be written" in fault
    assert facts.unseen == []


def test_checkpoints_need_what_is_not_there_yet(tmp_path: Path) -> None:
    recipe, _ = load_recipe([f"--output_dir={tmp_path}", "--train.keep_checkpoints=2"])
    parameters = 2_725_504  # README.md has them
    assert checkpoint_bytes([recipe]) == 3 * CHECKPOINT_BYTES * parameters
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "file").write_bytes(b"x" * 1000)
    assert checkpoint_bytes([recipe]) == 3 * CHECKPOINT_BYTES * parameters - 1000
    student = dataclasses.replace(recipe.student, vocabulary="corpus")
    trimmed = dataclasses.replace(copy.deepcopy(recipe), student=student)
    needed = checkpoint_bytes([trimmed])
    assert needed == 3 * CHECKPOINT_BYTES * (parameters - 16_000 * 128) - 1000


def start(rank: int, port: str, folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """A rank of two on a node of its own, as srun would start it."""
    command = [sys.executable, "-m", "pipeline.preflight", f"--output_dir={folder}/run"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=environment()
        | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": f"n{rank}"}
        | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_nodes_meet_and_what_is_wrong_with_one_ends_both(tmp_path: Path) -> None:
    packages = tmp_path / "packages" / "torch-9.9.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Name: torch\nVersion: 9.9\n")
    for path, statuses in (("", (0, 0)), (str(packages.parent), (1, 1))):
        port = free_port()
        paths = os.pathsep.join([path, str(ROOT)])
        ranks = [
            start(0, port, tmp_path, "--patience=300"),
            start(1, port, tmp_path, "--patience=300", PYTHONPATH=paths),
        ]
        said = [rank.communicate(timeout=600) for rank in ranks]
        assert tuple(rank.returncode for rank in ranks) == statuses, said
        assert said[1][0] == "", "rank 0 speaks for all"
        if path:
            (line,) = [line for line in said[0][1].splitlines() if line.startswith("error: ")]
            assert line.startswith("error: node n1: torch 9.9, where most have ")
        else:
            assert said[0][0].startswith("preflight: 2 nodes, 2 ranks, no GPUs, all-reduce ")
    assert os.listdir(tmp_path / "run") == []


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    alone = start(0, free_port(), tmp_path, "--nodes=n0,n1", "--patience=1")
    output, errors = alone.communicate(timeout=300)
    assert (alone.returncode, output) == (1, "")
    assert errors == "error: node n1: no rank of it came; waited 1 s for all ranks\n"
    lost = start(1, free_port(), tmp_path, "--patience=1")
    output, errors = lost.communicate(timeout=300)
    assert (lost.returncode, output) == (1, "")
    assert "error: node n1: rank 1 cannot reach rank 0 at 127.0.0.1:" in errors
