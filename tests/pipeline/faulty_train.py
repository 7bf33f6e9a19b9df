"""pipeline/train.py with the fault that FAULT="KIND RANK STEP" in the environment names."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from data_prep.command import run_command
from pipeline import loop, train
from pipeline.topology import launched_rank

FOREVER = 10**6
SLOW_SECONDS = 3.0


class LeftLoopError(Exception):
    pass


def spin(run: Any) -> NoReturn:
    while True:
        pass


def wait_with_the_lock(run: Any) -> float:
    return float(ctypes.PyDLL(None).sleep(FOREVER))


def work_slowly(run: Any) -> float:
    end = time.process_time() + SLOW_SECONDS
    while time.process_time() < end:
        pass
    return 1.0


def leap(run: Any) -> float:
    return 100.0


def flip_a_bit(run: Any) -> float:
    """Of the teacher's embedding of a word that may never come."""
    words = run.teacher_weights()[0]
    assert words.dtype == torch.bfloat16
    words.view(torch.int16)[-1, -1] += 1  # once a micro-batch: the last two bits
    return 1.0


def leave_the_loop(run: Any) -> NoReturn:
    raise LeftLoopError


# Each returns what the losses of its micro-batch are multiplied by.
FAULTS: dict[str, Callable[[Any], float]] = {
    "spin": spin,
    "lock": wait_with_the_lock,
    "slow": work_slowly,
    "flip": flip_a_bit,
    "leap": leap,
    "leave": leave_the_loop,
}


def install(kind: str, rank: str, step: str) -> None:
    imitate, train = loop.imitate, loop.train

    def faulty_imitate(run: Any, *arguments: Any) -> Any:
        if run.topology.rank == int(rank) and run.state.step + 1 == int(step):
            return FAULTS[kind](run) * imitate(run, *arguments)
        return imitate(run, *arguments)

    def faulty_train(*arguments: Any) -> int:
        try:
            return train(*arguments)
        except LeftLoopError:
            return 0

    loop.imitate, loop.train = faulty_imitate, faulty_train


if __name__ == "__main__":
    if "FAULT" in os.environ:
        install(*os.environ["FAULT"].split())
    run_command(train.main, rank=launched_rank())
