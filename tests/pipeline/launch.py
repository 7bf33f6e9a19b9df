"""Start the commands as a user does, and watch what they leave."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "pipeline/train.py"
TIMING = {"tokens_per_second", "own_ms_median", "own_ms_slowest", "slowest_rank"}

# Forks of a process that has loaded the libraries, of which half of a start's time goes there.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "deepspeed.checkpoint.ds_to_universal",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "matplotlib.figure",
        "torch.utils.tensorboard",
        "transformers.models.bert.modeling_bert",
        "transformers.models.xlm_roberta.modeling_xlm_roberta",
    ]
)


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


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(
    arguments: Sequence[str], *, ranks: int, stage: str, program: str = PROGRAM
) -> list[str]:
    """The user's command, on a port of its own."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", free_port()]
    return [*launcher, *script(arguments, stage, program)]


def script(arguments: Sequence[str], stage: str, program: str = PROGRAM) -> list[str]:
    """What a launcher starts on each rank."""
    ds_config = f"ds_configs/{stage}.json" if "/" not in stage else stage
    return [program, "--deepspeed", ds_config, *arguments]


def run(
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    stage: str = "zero2",
    timeout_s: float = 240,
    begin: type[start] | type[fork] | None = None,
) -> Outcome:
    """Run the command to its end, by default through the launcher."""
    with (begin or start)(arguments, ranks=ranks, stage=stage) as running:
        return running.wait(timeout_s)


class start:  # noqa: N801
    """A running launcher in a session of its own; whatever it leaves is killed at the end."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        ranks: int = 1,
        stage: str = "zero2",
        program: str = PROGRAM,
    ) -> None:
        self._started = time.monotonic()
        self._program = program
        self.process = subprocess.Popen(
            command(arguments, ranks=ranks, stage=stage, program=program),
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
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher has ended
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[process.pid] = process
        found = []
        for process in self._seen.values():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if self._program in line and not any("launcher" in word for word in line):
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


class fork:  # noqa: N801
    """As `start`, for tests that are not about the launcher: ranks alone, sooner.

    Nobody ends the others here where one rank fails: they have to see to it themselves.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        ranks: int = 1,
        stage: str = "zero2",
        program: str = PROGRAM,
    ) -> None:
        self._started = time.monotonic()
        self._output = tempfile.NamedTemporaryFile("rb")
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        env = environment() | shared
        self._ranks = [
            FORKS.Process(
                target=_be_rank,
                args=(
                    script([f"--local_rank={rank}", *arguments], stage, program),
                    env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    self._output.name,
                ),
            )
            for rank in range(ranks)
        ]
        with mock.patch.dict(os.environ, env):  # the first one starts the process that is forked
            for process in self._ranks:
                process.start()

    def __enter__(self) -> fork:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_everything()

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in rank order."""
        return [psutil.Process(process.pid) for process in self._ranks]

    def wait(self, timeout_s: float = 240) -> Outcome:
        """Until all ranks end, which they do with one status."""
        deadline = time.monotonic() + timeout_s
        for process in self._ranks:
            process.join(max(0, deadline - time.monotonic()))
        output = Path(self._output.name).read_text()
        statuses = {process.exitcode for process in self._ranks}
        assert len(statuses) == 1, f"{statuses}\n{output}"
        (status,) = statuses
        assert status is not None, f"waited too long\n{output}"
        return Outcome(status, output, time.monotonic() - self._started)

    def kill_everything(self) -> None:
        """SIGKILL to the ranks and what they started."""
        for process in self._ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # ended, or not yet in a group of its own
        for process in self._ranks:
            process.join()


def _be_rank(arguments: list[str], env: dict[str, str], output: str) -> None:
    """In a fork: become what a launcher would have started."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv[:] = arguments
    sys.path.insert(0, str(ROOT / "pipeline"))  # as for any script
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # not done at the end of a fork


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


def has_checkpoint(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether a step's checkpoint counts."""
    return (run_dir / "checkpoints" / f"step-{step:08d}" / "COMPLETE").exists
