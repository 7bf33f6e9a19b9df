"""Kills a training again and again, and compares what is left with an undisturbed one.

    python -m tests.soak.kills [--kills 100] [--seed 1] [--ranks 2] [--stage zero2] [--steps 600]

Every start is ended by one SIGKILL, to a rank, to the launcher or to all at once, at a random
instant of start-up and training or while a checkpoint is being written. What a kill leaves running
has to end by itself. After the last kill the run goes to its end; should it get there before, an
undisturbed one begins again in a new folder. Weights, metrics and rows have to be equal, byte for
byte; exit status 1 if they are not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.pipeline.conftest import POCKET, prepare, write_tiny
from tests.pipeline.launch import metrics, start
from tests.pipeline.test_train_resume import rows_by_step, student_bytes

ENDS_WITHIN_S = 120.0  # for those that a kill leaves, on a busy machine


@dataclasses.dataclass(frozen=True)
class Training:
    """The command of one run.

    Args:
        arguments: of train.py, without output_dir.
        ranks: that train.
        stage: of ZeRO, a name in ds_configs.
    """

    arguments: Sequence[str]
    ranks: int
    stage: str

    def start(self, folder: Path) -> start:
        """Begins or goes on with the run of a folder."""
        return start(
            [*self.arguments, "--output_dir", str(folder)], ranks=self.ranks, stage=self.stage
        )

    def finish(self, folder: Path) -> None:
        """Lets it train to its end."""
        with self.start(folder) as running:
            outcome = running.wait(timeout_s=3600)
        assert outcome.status == 0, outcome.output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", default="zero2")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = prepare(POCKET, folder / "shards", heldout_rows=3)
        tiny = write_tiny(folder, POCKET, shards)
        arguments = [
            *tiny,
            "--objective.num_relation_heads=8",
            f"--train.max_steps={options.steps}",
        ]
        training = Training(arguments, options.ranks, options.stage)
        differences = campaign(training, folder, options.kills, options.seed)
    print("\n".join(differences) or f"{options.kills} kills changed nothing")
    return 1 if differences else 0


def campaign(training: Training, folder: Path, num_kills: int, seed: int) -> list[str]:
    """Kill a training `num_kills` times.

    Args:
        training: to kill.
        folder: that its runs are written to.
        num_kills: SIGKILLs.
        seed: of the instants and the victims.

    Returns:
        What differs from the undisturbed run; nothing if all is well.
    """
    started = time.monotonic()
    training.finish(folder / "undisturbed")
    seconds = min(time.monotonic() - started, 30.0)
    moments = random.Random(seed)
    number, differences = 0, []
    done: collections.Counter[str] = collections.Counter()
    run = folder / "killed-0"
    for kill in range(1, num_kills + 1):
        while (run / "student").exists():  # it came to its end before it could be killed
            differences += compare(run, folder / "undisturbed")
            number += 1
            run = folder / f"killed-{number}"
        victim = moments.choice([*(f"rank {rank}" for rank in range(training.ranks)),
                                 "launcher", "all"])  # fmt: skip
        moment = moments.choice(["any time", "saving"])
        done[f"{victim}, {moment}"] += 1
        with training.start(run) as running:
            wait_for_moment(running, run, moment, moments.uniform(0, seconds), moments)
            strike(running, victim)
            wait_for_end(running)
        print(f"kill {kill}: {victim}, {moment}, at step {newest_step(run)}", flush=True)
    if not (run / "student").exists():
        training.finish(run)
    differences += compare(run, folder / "undisturbed")
    print(", ".join(f"{count} x {what}" for what, count in sorted(done.items())))
    return differences


def wait_for_moment(
    running: start, run: Path, moment: str, seconds: float, moments: random.Random
) -> None:
    """Until the instant of a kill: after so many seconds, or once a save has begun after them."""
    deadline = time.monotonic() + seconds
    while running.process.poll() is None and time.monotonic() < deadline:
        running.ranks()  # notes who there is
        time.sleep(0.01)
    if moment == "saving":
        known = saves(run)
        while running.process.poll() is None and saves(run) <= known:
            running.ranks()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.2))


def saves(run: Path) -> set[str]:
    """The checkpoints that have been begun."""
    return {path.name for path in run.glob("checkpoints/*step-*")}


def strike(running: start, victim: str) -> None:
    """SIGKILL to a rank, to the launcher, or to everything."""
    if victim == "all":
        running.kill_everything()
        return
    ranks = running.ranks()
    number = int(victim.removeprefix("rank ")) if victim.startswith("rank") else None
    process = running.process if number is None or number >= len(ranks) else ranks[number]
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return  # it has ended


def wait_for_end(running: start) -> None:
    """Until all that a kill has left is gone, by itself.

    Raises:
        AssertionError: something trains on.
    """
    deadline = time.monotonic() + ENDS_WITHIN_S
    running.process.communicate(timeout=ENDS_WITHIN_S)
    while left := [rank for rank in running.ranks() if is_alive(rank)]:
        assert time.monotonic() < deadline, f"{left} run on"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def newest_step(run: Path) -> int:
    """The last step that was logged."""
    return max((line["step"] for line in metrics(run)), default=0)


def compare(killed: Path, undisturbed: Path) -> list[str]:
    """What of a killed run is not as in the undisturbed one."""
    kinds: dict[str, Callable[[Path], object]] = {
        "weights": student_bytes, "metrics": metrics, "rows": rows_by_step
    }  # fmt: skip
    return [f"{killed.name}: {what} differ" for what, of in kinds.items()
            if of(killed) != of(undisturbed)]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
