"""What the benchmarks share: interleaved timing, the device's name, a table, a kept result."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MALLOC = "MALLOC_MMAP_THRESHOLD_"  # bytes of a block from which glibc asks the kernel for it alone
Result = TypeVar("Result")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --json and --no_save."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--no_save", action="store_true", help="leave benchmarks/results/ as it is")
    return parser


def device() -> torch.device:
    """The device that is measured: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The measured device in words, with the number of threads where it is a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def set_threads(threads: int | None) -> None:
    """Let torch compute with this many CPU threads, here and in processes started from here."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function of a module returns in a new interpreter, whose memory nothing has grown.

    There, glibc gives every larger block back when it is freed, so that resident memory is what is
    in use.
    """
    os.environ[MALLOC] = "65536"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            return processes.submit(function, *arguments).result()
    finally:
        del os.environ[MALLOC]


def interleaved(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each case, all cases in turn, so that noise falls on all alike.

    Args:
        cases: what is measured; each call does the same work.
        repeats: timed calls of each.
        warmup: calls of each before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            synchronize()
            started = time.perf_counter()
            case()
            synchronize()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(case: Callable[[], object]) -> int:
    """Peak memory that a call holds beyond what was held before it.

    On a GPU what torch's allocator counts; on a CPU the growth of resident memory, for which the
    kernel's own high-water mark is reset first (Linux).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = held_bytes()
        case()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = held_bytes()
    case()
    return _status_bytes("VmHWM") - before


def held_bytes() -> int:
    """Memory in use now, counted as `peak_bytes` does."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(re.findall(rf"{key}:\s*(\d+) kB", status)[0])


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratio: tuple[str, float],
    options: argparse.Namespace,
    **facts: Any,
) -> None:
    """Print a table and its ratio, or all as JSON, and keep it with the device's name.

    Args:
        name: of the benchmark; begins the kept file's name.
        rows: the table, one mapping of column to value a row, all with the same columns.
        ratio: the one figure and what it says.
        options: parsed `arguments`.
        facts: conditions and further figures.
    """
    result = {
        "benchmark": name,
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "revision": _revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **facts,
        "rows": list(rows),
        "ratio": {"what": ratio[0], "value": ratio[1]},
    }
    text = json.dumps(result, indent=2) + "\n"
    if not options.no_save:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.{slug}.json").write_text(text, encoding="utf-8")
    if options.json:
        print(text, end="")
        return
    print_table(f"{name} on {device_name()}", rows)
    print(f"{ratio[0]}: {ratio[1]:.3g}")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same columns, under a title."""
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if _is_number(rows[0][column]) else "left")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console.print(table)


def _revision() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
