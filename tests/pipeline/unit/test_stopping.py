from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import stopping
from pipeline.stopping import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_nobody_asked() -> None:
    request = StopRequest()
    assert not request.requested()
    assert request.reason is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_interrupts_nothing(number: signal.Signals) -> None:
    request = StopRequest()
    os.kill(os.getpid(), number)
    assert request.requested()
    assert request.requested()
    assert request.reason == f"signal {number.name}"


def test_another_parent_means_that_the_launcher_died(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest()
    parent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert request.requested()
    monkeypatch.setattr(os, "getppid", lambda: parent)
    assert request.requested()  # once asked, always asked
    assert request.reason == "the launcher died"


def test_a_host_without_proc_has_a_parent_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "Path", lambda path: Path("/no/such") / path.lstrip("/"))
    request = StopRequest()
    assert not request.requested()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert request.requested()


RANK = """
import sys, time
from pathlib import Path
from pipeline.stopping import StopRequest
request, here = StopRequest(), Path(sys.argv[1])
(here / "ready").touch()
for _ in range(2000):
    if request.requested():
        (here / "reason.partial").write_text(request.reason)
        (here / "reason.partial").rename(here / "reason")
        break
    time.sleep(0.01)
"""
# Starts the command of its arguments after the first, and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[2:])"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "names",
    [
        ["any-launcher"],
        ["deepspeed", "deepspeed.launcher.launch"],  # the runner dies, its per-host part lives on
    ],
    ids=str,
)
def test_a_rank_outlives_its_launcher_only_to_stop(
    names: list[str], repo: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    for name in reversed(names):
        command = [sys.executable, "-c", LAUNCHER, name, *command]
    launcher = subprocess.Popen(command, cwd=repo)
    try:
        wait_for(tmp_path / "ready")
        time.sleep(0.1)
        assert not (tmp_path / "reason").exists()
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(tmp_path / "reason")
    assert (tmp_path / "reason").read_text() == "the launcher died"
