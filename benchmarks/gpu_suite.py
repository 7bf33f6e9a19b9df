"""The benchmarks that a GPU is for, one after the other, in less than eight minutes.

    python benchmarks/gpu_suite.py [--json]

Runs step_vs_padded, mfu (plain, compiled, with a float8 teacher), peak_memory and attention in the
large shape, relation_kl and loader, each in a process of its own with a time limit; one that fails
or takes too long is named in the summary, and the others go on. Keeps everything in
benchmarks/results/gpu_suite.DEVICE.json.

Exit status: 0 all done, 1 one of them failed, 2 torch sees no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import arguments, report
from pipeline.config import ROOT

LARGE = ["--shape", "large"]
MFU = [*LARGE, "--batches", "2", "--rows", "32"]
SUITE: dict[str, tuple[str, int, list[str]]] = {  # the script, seconds at most, its options
    "step_vs_padded": ("step_vs_padded", 110, MFU),
    "mfu": ("mfu", 60, MFU),
    "mfu, compiled": ("mfu", 90, [*MFU, "--compile"]),
    "mfu, float8 teacher": ("mfu", 60, [*MFU, "--teacher_dtype", "float8"]),
    "peak_memory": ("peak_memory", 50, [*LARGE, "--batches", "2", "--rows", "6"]),
    "relation_kl": ("relation_kl", 55, []),
    "attention": ("attention", 25, LARGE),
    "loader": ("loader", 25, ["--tokens", "3000000", "--repeats", "1"]),
}
MAIN = "step_vs_padded"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, report."""
    options = arguments(__doc__).parse_args(argv)
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here; run the benchmarks one by one", file=sys.stderr)
        return 2
    results: dict[str, Any] = {}
    rows = []
    for name, (script, limit, arguments_) in SUITE.items():
        started = time.perf_counter()
        results[name], status = run(script, arguments_, limit)
        ratio = (results[name] or {}).get("ratio", {"what": "-", "value": "-"})
        seconds = time.perf_counter() - started
        rows.append({"benchmark": name, **ratio, "seconds": seconds, "status": status})
    value = results[MAIN]["ratio"]["value"] if results[MAIN] else 0.0
    ratio = ("padded bf16 / ours, time per real token (0: failed)", value)
    report("gpu_suite", rows, ratio, options, results=results)
    return 0 if all(results.values()) else 1


def run(name: str, options: list[str], limit: int) -> tuple[dict[str, Any] | None, str]:
    """A benchmark's result, or None and why there is none."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", "--no_save", *options]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"not done after {limit} s"
    if done.returncode:
        return None, (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout), "done"


if __name__ == "__main__":
    sys.exit(main())
