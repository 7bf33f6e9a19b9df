"""Ranks that stop moving: the run ends, says who it was, and leaves nobody behind."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.pipeline.faulty_train import SLOW_SECONDS
from tests.pipeline.launch import fork, has_step, start, wait_for

FAULTY = "tests/pipeline/faulty_train.py"
HANG_SECONDS = 6


@pytest.fixture
def watched(tiny: list[str]) -> list[str]:
    """Steps without end, of which the run must be freed by the watch."""
    endless = ["--train.max_steps=40000", "--train.save_every=40000", "--train.eval_every=0"]
    return [*tiny, *endless, f"--watch.hang_seconds={HANG_SECONDS}"]


def culprit(rank: int) -> str:
    return rf"rank {rank} \({re.escape(socket.gethostname())}, process (\d+)\)"


def below(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Processes and all that they started."""
    return [p for process in processes for p in (process, *process.children(recursive=True))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("spin", r"is in step 6, micro-batch 1 of 2 .*? \(pipeline/loop\.py:\d+ train_step\)"),
        ("leave", r"waits for others in step 6, .* \(pipeline/collectives\.py:\d+ disconnect\)"),
    ],
)
def test_the_rank_that_does_not_go_on_is_named(
    kind: str, place: str, watched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", f"{kind} 1 6")
    with fork(watched, ranks=2, program=FAULTY) as running:
        wait_for(has_step(tmp_path / "run", 5))
        processes = below(running.ranks())
        outcome = running.wait()
        psutil.wait_procs(processes, timeout=10)
    assert len(processes) == 4, "two ranks and their guards"
    assert not any(process.is_running() for process in processes)
    assert outcome.status == 1, outcome.output
    (line,) = outcome.errors
    assert re.search(rf"hang: .*: {culprit(1)} {place}, while rank 0 is in step 6", line), line
    dumps = sorted((tmp_path / "run" / "hangs").iterdir())
    assert [path.name for path in dumps] == [f"step-00000006-rank-0000{r}.txt" for r in (0, 1)]
    for dump in dumps:
        text = dump.read_text()
        assert text.startswith(line)
        assert "most recent call first" in text
        assert "in main" in text
        assert text.partition("\n\n")[2] in outcome.output


@pytest.mark.slow
def test_a_rank_whose_threads_do_not_run_is_killed(
    watched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "lock 0 6")
    with fork(watched, program=FAULTY) as running:
        wait_for(has_step(tmp_path / "run", 5))
        outcome = running.wait()
    assert outcome.status in (-signal.SIGABRT, -signal.SIGKILL), outcome.output
    (line,) = outcome.errors
    assert re.search(rf"hang: {culprit(0)} gave no sign of life", line), line
    assert "in wait_with_the_lock" in outcome.output  # faulthandler's


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_nothing_is_left(
    rank: int, watched: list[str], tmp_path: Path
) -> None:
    with start(watched, ranks=2) as running:
        wait_for(has_step(tmp_path / "run", 5))
        stopped, processes = running.ranks()[rank], below([psutil.Process(running.process.pid)])
        assert len(processes) == 6, "the launcher's two, two ranks and their guards"
        stopped.send_signal(signal.SIGSTOP)
        outcome = running.wait()
        _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert outcome.status not in (0, 2, 85), outcome.output
    line = outcome.errors[0]
    assert "does not answer" in line
    assert "hang: " in line
    named = re.search(culprit(1) + " does not", line) if rank else re.search("rank 0 .*keeps", line)
    assert named, line
    assert rank == 0 or int(named[1]) == stopped.pid
    assert all("gave no sign of life" in more for more in outcome.errors[1:])  # its guard's


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on(
    watched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "slow 0 6")
    with fork(watched, program=FAULTY) as running:
        wait_for(has_step(tmp_path / "run", 5))
        time.sleep(SLOW_SECONDS / 2)
        processes = below(running.ranks())
        for process in processes:
            process.suspend()
        time.sleep(2.5 * HANG_SECONDS)
        for process in processes:
            process.resume()
        wait_for(has_step(tmp_path / "run", 8))
        assert len(processes) == 2
        assert all(process.is_running() for process in processes)
