"""`make demo`: the whole product on the embedded text, and what it made.

Prepares with two MPI ranks, distils, is stopped half-way by a signal and resumes, exports, measures
and reports: the same commands that a user types, in processes of their own. Starts from scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from data_prep.command import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    ConfigError,
    RunError,
    one_line,
    run_command,
)
from pipeline.config import DEFAULT_RECIPE, ROOT, Recipe, load_recipe
from pipeline.inference import compare_inference
from pipeline.metrics import METRICS, read_lines
from pipeline.report import INFERENCE, read_run, write_report

CPU_RANKS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--teacher", default="models/pocket-teacher", help="hub id or folder")
    parser.add_argument("--output_dir", default="runs/demo")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    output_dir = Path(options.output_dir)
    overrides = [
        f"--output_dir={output_dir}",
        f"--teacher.model={options.teacher}",
        f"--prep.output_dir={output_dir / 'shards'}",
    ]
    recipe, _ = load_recipe(["--config", str(DEFAULT_RECIPE), *overrides])
    shutil.rmtree(output_dir, ignore_errors=True)
    started = time.monotonic()
    _say(1, "prepare: text -> shards, two MPI ranks")
    _check(_prepare(overrides), "the preparation")
    _say(2, f"distil, and stop half-way ({_device()})")
    stopped = _distil(overrides, stop_at=recipe.train.max_steps // 2)
    if stopped != EXIT_STOPPED:
        raise RunError(f"the interrupted training ended with {stopped}, not {EXIT_STOPPED}")
    print(f"stopped with exit status {stopped}, checkpoint saved", flush=True)
    _say(3, "the same command again: resume, finish, export")
    _check(_distil(overrides), "the resumed training")
    _say(4, "measure: teacher and student side by side")
    student = output_dir / "student"
    inference = compare_inference(recipe, student, recipe.prep.seq_len)
    (output_dir / INFERENCE).write_text(json.dumps(inference, indent=2))
    report = write_report([output_dir])
    print(_summary(recipe, output_dir, time.monotonic() - started))
    print(f"report: {report}")
    return EXIT_FINISHED


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{CPU_RANKS} CPU ranks"


def _check(status: int, what: str) -> None:
    if status:
        raise RunError(f"{what} ended with status {status}; its message is above")


def _prepare(overrides: list[str]) -> int:
    command = ["mpirun", "-n", str(CPU_RANKS), sys.executable, "-m", "data_prep.build_shards"]
    keys = [o for o in overrides if o.startswith(("--prep.", "--teacher.", "--output_dir"))]
    try:
        return subprocess.run([*command, "--config", str(DEFAULT_RECIPE), *keys]).returncode
    except FileNotFoundError as error:
        raise ConfigError(
            f"mpirun is not installed ({one_line(error)}); run `make setup`"
        ) from error


def _distil(overrides: list[str], stop_at: int | None = None) -> int:
    """Train with the `deepspeed` launcher; ask rank 0 to stop once a step is reached."""
    ranks = [] if torch.cuda.is_available() else ["--num_accelerators", str(CPU_RANKS)]
    env = {**os.environ, "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    quiet = ["--log_level", "error"]  # the launcher's own lines say nothing that is needed here
    script = ["pipeline/train.py", "--deepspeed", "ds_configs/zero2.json"]
    command = ["deepspeed", *ranks, *quiet, *script]
    launcher = subprocess.Popen([*command, "--config", str(DEFAULT_RECIPE), *overrides], env=env)
    output_dir = Path(overrides[0].partition("=")[2])
    while stop_at is not None and launcher.poll() is None:
        lines = read_lines(output_dir / METRICS)
        if lines and lines[-1]["step"] >= stop_at:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                if process.environ().get("RANK") == "0":
                    process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    return launcher.wait()


def _summary(recipe: Recipe, output_dir: Path, seconds: float) -> str:
    facts = read_run(output_dir)
    assert facts.inference is not None
    first, last = facts.training[0], facts.training[-1]
    teacher, student = facts.inference["teacher"], facts.inference["student"]
    by_language = [
        f"{name} {start:.3f} -> {end:.3f}" for name, (start, end) in facts.by_language.items()
    ]
    rows = ["   ".join(by_language[i : i + 5]) for i in range(0, len(by_language), 5)]
    speeds = sorted(line["tokens_per_second"] for line in facts.training)
    return "\n".join(
        [
            "",
            f"teacher    {recipe.teacher.model}: {teacher['parameters']:,} parameters",
            f"student    {output_dir}/student: {student['parameters']:,} parameters, "
            f"{student['embeddings']:,} of them word embeddings",
            f"loss       {first['loss']:.4f} (step {first['step']}) -> {last['loss']:.4f} "
            f"(step {last['step']})",
            f"held-out   {facts.heldout[0]['heldout_loss']:.4f} (step {facts.heldout[0]['step']}) "
            f"-> {facts.heldout[-1]['heldout_loss']:.4f} (step {facts.heldout[-1]['step']})",
            *(f"           {row}" for row in rows),
            f"training   {last['tokens']:,} tokens at {speeds[len(speeds) // 2]:,.0f} tokens/s "
            "(median)",
            f"inference  student {facts.inference['speedup']:.2f}x the teacher's speed "
            f"({facts.inference['conditions']})",
            f"time       {seconds:.0f} s in all",
        ]
    )


if __name__ == "__main__":
    run_command(main)
