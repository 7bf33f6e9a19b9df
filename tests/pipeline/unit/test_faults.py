from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_prep.command import RunError
from pipeline import faults, progress
from pipeline.config import Recipe
from pipeline.faults import bad_memory, naming_faults, xids
from pipeline.progress import Progress

SMI = """
==============NVSMI LOG==============

Timestamp                                              : Sun Nov 22 02:00:00 2026
Driver Version                                         : 550.54.15
CUDA Version                                           : 12.4

Attached GPUs                                          : 2
GPU 00000000:07:00.0
    ECC Mode
        Current                                        : Enabled
        Pending                                        : Enabled
    ECC Errors
        Volatile
            SRAM Correctable                           : 0
            SRAM Uncorrectable Parity                  : 0
            DRAM Correctable                           : 0
            DRAM Uncorrectable                         : 2
        Aggregate
            DRAM Uncorrectable                         : 14
            SRAM Threshold Exceeded                    : No
    Retired Pages
        Single Bit ECC                                 : N/A
        Pending Page Blacklist                         : N/A
    Remapped Rows
        Correctable Error                              : 0
        Uncorrectable Error                            : 1
        Pending                                        : Yes
        Remapping Failure Occurred                     : No
        Bank Remap Availability Histogram
            Max                                        : 1279 bank(s)

GPU 00000000:0A:00.0
    ECC Errors
        Volatile
            DRAM Uncorrectable                         : 0
    Remapped Rows
        Pending                                        : No
"""
DMESG = """
[ 1.0] NVRM: loading NVIDIA UNIX x86_64 Kernel Module
[ 9.1] NVRM: Xid (PCI:0000:07:00): 13, pid=1
[ 9.2] NVRM: Xid (PCI:0000:07:00): 31, pid=1
[ 9.3] NVRM: Xid (PCI:0000:07:00): 48, pid=1
[ 9.4] usb 1-1: new device
[ 9.5] NVRM: Xid (PCI:0000:07:00): 94, pid=1
"""


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Progress()
    here.begin("reading", step=8)
    here.begin("micro-batch 2 of 4 (4096 tokens, 8 rows)")
    here.enter("teacher")
    monkeypatch.setattr(faults, "PROGRESS", here)
    monkeypatch.setattr(progress, "PROGRESS", here)


@pytest.fixture
def refusal(make_recipe: Callable[..., Recipe]) -> Callable[..., str]:
    def of(fail: Callable[[], object], micro: int = 4) -> str:
        recipe = make_recipe(train={"micro_batch_size": micro})
        with pytest.raises(RunError) as caught, naming_faults(recipe, 3):
            fail()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return of


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "wanted"),
    [
        (lambda: torch.empty(10**15), "4000000000000000 bytes more"),
        (failing(MemoryError()), "more memory"),
        (
            failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU")),
            "2.50 GiB more",
        ),
    ],
)
def test_no_memory_says_what_for_and_what_to_set(
    fail: Callable[[], object], wanted: str, refusal
) -> None:
    message = refusal(fail)
    start = "step 8, micro-batch 2 of 4 (4096 tokens, 8 rows), teacher, rank 3 ("
    assert message.startswith(start)
    assert f"no room for {wanted}; this rank has " in message
    assert "halve train.micro_batch_size=4" in message
    assert "python -m pipeline.plan" in message
    assert "zero3" in refusal(fail, micro=1)


def test_a_gpu_that_fails_is_shown_with_its_counters(
    refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, SMI if command[0] == "nvidia-smi" else DMESG)

    monkeypatch.setattr(subprocess, "run", run)
    message = refusal(
        failing(torch.AcceleratorError("CUDA error: uncorrectable ECC error\nCUDA kernel errors"))
    )
    assert "rank 3 (" in message
    assert (
        "the GPU failed (CUDA error: uncorrectable ECC error); its memory: GPU 07:00.0" in message
    )
    assert message.count("GPU 07:00.0") == 4
    assert message.count("Xid") == 3


def test_without_the_drivers_tools_the_error_is_told_still(
    refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: Any, **options: Any) -> Any:
        if command[0] == "dmesg":
            return subprocess.CompletedProcess(command, 1, "", "not permitted")
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", run)
    message = refusal(failing(RuntimeError("CUDA error: an illegal memory access")))
    assert "nvidia-smi cannot be asked; kernel: its log cannot be read" in message


def test_other_errors_pass(make_recipe) -> None:
    for error in (RuntimeError("shape mismatch"), RunError("known"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)), naming_faults(make_recipe(), 0):
            raise error


def test_what_is_wrong_with_memory() -> None:
    assert bad_memory(SMI) == [
        "GPU 07:00.0 ECC Errors Volatile DRAM Uncorrectable 2",
        "GPU 07:00.0 ECC Errors Aggregate DRAM Uncorrectable 14",
        "GPU 07:00.0 Remapped Rows Uncorrectable Error 1",
        "GPU 07:00.0 Remapped Rows Pending Yes",
    ]
    assert bad_memory("") == []


def test_the_kernels_last_errors() -> None:
    assert [line.split()[-2] for line in xids(DMESG)] == ["31,", "48,", "94,"]
