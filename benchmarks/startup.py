"""Seconds from the command to the first metrics line, and to the refusal of a typo.

    python benchmarks/startup.py [--ranks 2] [--json]

The command is a user's: `deepspeed --num_accelerators N pipeline/train.py` with the demo's recipe,
whose shards are prepared before. The typo stands in a copy of the recipe. What imports cost is what
`python -X importtime` says of `import pipeline.assemble`, summed by top-level package.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import arguments, report, set_threads
from pipeline.config import DEFAULT_DS_CONFIG, DEFAULT_RECIPE, ROOT

TARGET = 15.0  # seconds to the first line
PATIENCE = 300.0
PACKAGES = 8  # rows of the table


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--repeats", type=int, default=3, help="starts of each kind")
    options = parser.parse_args(argv)
    set_threads(1)  # of each rank
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / "shards")
        typo = folder / "typo.yaml"
        typo.write_text(DEFAULT_RECIPE.read_text("utf-8").replace("max_steps:", "max_step:"))
        first, refused = [], []
        for repeat in range(options.repeats):
            first.append(seconds_to_first_line(folder, options.ranks, folder / f"run-{repeat}"))
            refused.append(seconds_to_refusal(typo, options.ranks))
    packages = import_seconds()
    rows: list[dict[str, str | float]] = [
        {"what": "launcher to the first metrics line", "seconds": statistics.median(first)},
        {"what": "launcher to the refusal of a typo", "seconds": statistics.median(refused)},
        {
            "what": "import pipeline.assemble, python -X importtime",
            "seconds": sum(packages.values()),
        },
    ]
    largest = sorted(packages, key=lambda package: -packages[package])[:PACKAGES]
    rows += [{"what": f"- of it {package}", "seconds": packages[package]} for package in largest]
    report(
        "startup",
        rows,
        (f"{TARGET:.0f} s / first metrics line", TARGET / statistics.median(first)),
        options,
        ranks=options.ranks,
        repeats=options.repeats,
        first_line_seconds=first,
        refusal_seconds=refused,
    )


def prepare(shards: Path) -> None:
    """Make the demo's shards."""
    command = [sys.executable, "-m", "data_prep.build_shards", "--config", str(DEFAULT_RECIPE)]
    command.append(f"--prep.output_dir={shards}")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def launcher(ranks: int, recipe: Path) -> list[str]:
    """The user's command, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    started = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(port)]
    script = ["pipeline/train.py", "--deepspeed", str(DEFAULT_DS_CONFIG), "--config", str(recipe)]
    return [*started, *script]


def seconds_to_first_line(folder: Path, ranks: int, output_dir: Path) -> float:
    """Start the demo and end it once it has written a line."""
    command = launcher(ranks, DEFAULT_RECIPE)
    command += [f"--data.shards={folder / 'shards'}", f"--output_dir={output_dir}"]
    metrics = output_dir / "metrics.jsonl"
    started = time.perf_counter()
    with open(folder / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not (metrics.exists() and "\n" in metrics.read_text("utf-8")):
                seconds = time.perf_counter() - started
                if process.poll() is not None or seconds > PATIENCE:
                    log.seek(0)
                    raise SystemExit(f"no metrics line after {seconds:.0f} s:\n{log.read()}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher with its ranks, all of which are in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def seconds_to_refusal(recipe: Path, ranks: int) -> float:
    """Start the recipe with the typo until the launcher has ended."""
    started = time.perf_counter()
    done = subprocess.run(launcher(ranks, recipe), cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if not done.returncode or "max_step" not in done.stderr + done.stdout:
        raise SystemExit(f"the typo was not refused:\n{done.stdout}{done.stderr}")
    return seconds


def import_seconds() -> dict[str, float]:
    """What `import pipeline.assemble` spends in each top-level package."""
    command = [sys.executable, "-X", "importtime", "-c", "import pipeline.assemble"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return seconds_by_package(done.stderr)


def seconds_by_package(importtime: str) -> dict[str, float]:
    """Seconds of modules themselves, without what they import, by top-level package."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", importtime):
        seconds[module.split(".")[0]] += int(own) / 1e6
    return dict(seconds)


if __name__ == "__main__":
    main()
