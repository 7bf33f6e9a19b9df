"""Start the commands as a user does, and watch what they leave."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"tokens_per_second"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a launcher ended."""

    status: int
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that a user would look at."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def environment() -> dict[str, str]:
    """One thread a rank, so that two tests at once do not fight for cores."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return env


def command(arguments: Sequence[str], *, ranks: int, stage: str) -> list[str]:
    """The user's command, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port)]
    ds_config = f"ds_configs/{stage}.json" if "/" not in stage else stage
    return [*launcher, "pipeline/train.py", "--deepspeed", ds_config, *arguments]


def run(
    arguments: Sequence[str], *, ranks: int = 1, stage: str = "zero2", timeout_s: float = 240
) -> Outcome:
    """Run the command to its end."""
    with start(arguments, ranks=ranks, stage=stage) as running:
        return running.wait(timeout_s)


class start:  # noqa: N801
    """A running launcher in a session of its own; whatever it leaves is killed at the end."""

    def __init__(self, arguments: Sequence[str], *, ranks: int = 1, stage: str = "zero2") -> None:
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            command(arguments, ranks=ranks, stage=stage),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> start:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_everything()

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in rank order."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[process.pid] = process
        found = []
        for process in self._seen.values():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "pipeline/train.py" in line and not any("launcher" in word for word in line):
                found.append(process)
        return sorted(found, key=lambda p: p.environ().get("RANK", ""))

    def wait(self, timeout_s: float = 240) -> Outcome:
        """Until the launcher ends."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return Outcome(self.process.returncode, output, time.monotonic() - self._started)

    def kill_everything(self) -> None:
        """SIGKILL to the whole session, as a machine that loses power."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for process in self._seen.values():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics lines without the fields that name time."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in whole]


def training(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The training lines of the metrics."""
    return (line for line in metrics(run_dir) if "loss" in line)


def has_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether a step was logged."""
    return lambda: any(line["step"] >= step for line in metrics(run_dir))
