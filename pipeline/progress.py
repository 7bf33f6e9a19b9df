"""What this process is doing, noted where it begins, for whoever watches it or explains its end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch.profiler import record_function

ROOT = Path(__file__).resolve().parent.parent
OWN_WORK = ("data", "teacher")  # the parts of a step in which no rank waits for another one


class Progress:
    """A process's place in its work: the step, the task and the part of it.

    Every rank goes through the same tasks and parts, so their counts say who is behind.
    """

    def __init__(self) -> None:
        self.step, self.task, self.part, self.count = 0, "starting", "", 0
        self._seconds = 0.0
        self._on_gpu: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, task: str, *, step: int | None = None) -> None:
        """Go over to a task; with a step, which counts from 1, it is that step's first one."""
        if step is not None:
            self.step, self._seconds = step, 0.0
            self._on_gpu.clear()
        self.task, self.part = task, ""
        self.count += 1

    def enter(self, part: str) -> None:
        """Go over to a part of the task."""
        self.part = part
        self.count += 1

    def describe(self) -> str:
        """The place in words, such as "step 8, micro-batch 1 of 4 (4096 tokens), teacher"."""
        return ", ".join(word for word in (f"step {self.step}", self.task, self.part) if word)

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Count the time inside as this rank's own work of the step."""
        if torch.cuda.is_initialized():  # the host runs ahead of it, so its own clock has to tell
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._on_gpu.append(events)
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def own_seconds(self) -> float:
        """Seconds of the step's OWN_WORK so far; waits for a GPU to have done it."""
        for first, last in self._on_gpu:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        self._on_gpu.clear()
        return self._seconds


PROGRESS = Progress()  # of this process, which does one thing at a time


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Name a part of the task, to the watch and to the profiler; also a decorator."""
    PROGRESS.enter(name)
    with record_function(name):
        if name in OWN_WORK:
            with PROGRESS.timing():
                yield
        else:
            yield


def whereabouts(thread: int) -> tuple[str, bool]:
    """The line of this project that a thread is at, and whether it waits for other ranks there.

    Args:
        thread: its `ident`.
    """
    frame: FrameType | None = sys._current_frames().get(thread)
    waits = False
    while frame is not None:
        path = frame.f_code.co_filename
        waits = waits or "/torch/distributed/" in path
        if path.startswith(str(ROOT / "pipeline")) or path.startswith(str(ROOT / "data_prep")):
            name = Path(path).relative_to(ROOT)
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "no line of this project", waits
