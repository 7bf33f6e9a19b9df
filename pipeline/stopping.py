"""Requests to stop: signals to any rank, and the death of the launcher that started it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Remembers that this rank was asked to stop; the loop asks at every step.

    SIGTERM, SIGUSR1 and SIGINT only set a flag: the step is finished and saved first. The
    `deepspeed` launcher does not forward signals, and a killed one leaves its ranks running, so a
    changed line of ancestors counts as a request too.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._ancestors = _ancestors()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = f"signal {signal.Signals(number).name}"

    def requested(self) -> bool:
        """Whether this rank was asked to stop since it started."""
        if self.reason is None and _ancestors() != self._ancestors:
            self.reason = "the launcher died"
        return self.reason is not None


def _ancestors() -> tuple[int, ...]:
    """The parent and, where that is DeepSpeed's per-host launcher, the runner above it."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if b"deepspeed.launcher.launch" not in command:
            return (parent,)
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)  # no /proc here, or the parent is just going
    return (parent, int(status.rpartition(")")[2].split()[1]))
