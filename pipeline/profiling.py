"""`--profile`: a trace of a few steps, and a table of where their time goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

WARM_UP, ACTIVE = 3, 3  # steps that are passed over, and steps that are recorded
STEP = "step"
# Named in place, with torch.profiler.record_function, and in the order of the step.
PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")


@contextlib.contextmanager
def profiling(folder: Path, *, enabled: bool, rank: int) -> Iterator[Callable[[], object]]:
    """Record the steps after the first three, and write what was seen of them.

    Args:
        folder: gets rank-NNNNN.trace.json, for chrome://tracing or ui.perfetto.dev, and
            rank-NNNNN.txt, the table.
        enabled: otherwise nothing happens.
        rank: this process's.

    Yields:
        What to call after every step.
    """
    if not enabled:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{rank:05d}"

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / f"{name}.trace.json"))
        averages = profiler.key_averages()
        table = f"{parts_table(averages)}\n\n{averages.table(sort_by=_order(), row_limit=40)}\n"
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")

    steps = schedule(wait=WARM_UP - 1, warmup=1, active=ACTIVE, repeat=1)
    activities = supported_activities()
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step


def _order() -> str:
    on_gpu = ProfilerActivity.CUDA in supported_activities()
    return "self_cuda_time_total" if on_gpu else "self_cpu_time_total"


def parts_table(averages: Any) -> str:
    """Milliseconds a step of each part, as the host sees them, and their share of the step.

    On a GPU the host runs ahead: there a part's row is the time to queue its work, and the wait for
    all of it falls to the part that reads a result, the optimizer.
    """
    seconds = {event.key: event.cpu_time_total / event.count / 1e3 for event in averages}
    counts = {event.key: event.count for event in averages}
    whole = seconds[STEP]
    rows = {part: seconds.get(part, 0.0) * counts.get(part, 0) / counts[STEP] for part in PARTS}
    rows["rest"] = whole - sum(rows.values())
    rows[STEP] = whole
    return "\n".join(f"{part:10}{ms:12.2f} ms{ms / whole:8.1%}" for part, ms in rows.items())
