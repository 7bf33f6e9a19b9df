"""pipeline/train.py with the fault that FAULT="KIND RANK STEP" in the environment names."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.command import run_command
from pipeline import loop, train
from pipeline.topology import launched_rank

FOREVER = 10**6
SLOW_SECONDS = 3.0


class LeftLoopError(Exception):
    pass


def spin(run: Any) -> None:
    while True:
        pass


def wait_with_the_lock(run: Any) -> None:
    ctypes.PyDLL(None).sleep(FOREVER)


def work_slowly(run: Any) -> None:
    end = time.process_time() + SLOW_SECONDS
    while time.process_time() < end:
        pass


def leave_the_loop(run: Any) -> None:
    raise LeftLoopError


FAULTS = {
    "spin": spin,
    "lock": wait_with_the_lock,
    "slow": work_slowly,
    "leave": leave_the_loop,
}


def install(kind: str, rank: str, step: str) -> None:
    imitate, train = loop.imitate, loop.train

    def faulty_imitate(run: Any, *arguments: Any) -> Any:
        if run.topology.rank == int(rank) and run.state.step + 1 == int(step):
            FAULTS[kind](run)
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
