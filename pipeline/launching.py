"""Starting train.py as a user would, from commands that run it several times."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from data_prep.command import ConfigError
from pipeline.config import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def run_training(launcher: str, arguments: Sequence[str]) -> int:
    """Start pipeline/train.py, pass signals on to it, and wait for its exit status.

    Args:
        launcher: a command and its options; looked for beside this Python first.
        arguments: train.py's.

    Raises:
        ConfigError: there is no such launcher.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [*_words(launcher, path), str(ROOT / "pipeline" / "train.py"), *arguments]
    process = subprocess.Popen(command, env={**os.environ, "PATH": path})

    def pass_on(number: int, frame: FrameType | None) -> None:
        # The deepspeed launcher would die of it; one rank that is asked to stop stops all. Ranks
        # on other hosts belong to a launcher such as srun, which hands signals on.
        for receiver in _local_ranks(process.pid) or [psutil.Process(process.pid)]:
            receiver.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _words(launcher: str, path: str) -> list[str]:
    """The launcher and its options, where there is such a command on `path`."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(
            f"the launcher {launcher!r} is no command line ({error}); correct its quotes"
        ) from error
    if not words or shutil.which(words[0], path=path) is None:
        raise ConfigError(
            f"the launcher {launcher!r} is not installed, so nothing can be started; run `make "
            "setup`, or name another one"
        )
    return words


def _local_ranks(launcher: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may just have ended
            if "RANK" in process.environ():
                found.append(process)
    return found
