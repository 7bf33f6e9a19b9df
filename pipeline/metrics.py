"""metrics.jsonl and TensorBoard: what a run says of itself, cut to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.command import RunError

METRICS = "metrics.jsonl"
# All that may differ between equal runs.
TIMING_KEYS = frozenset(
    {"tokens_per_second", "seconds", "own_ms_median", "own_ms_slowest", "slowest_rank"}
)


class JsonLines:
    """A file of JSON lines with a `step` each, that survives kills at any byte.

    Args:
        path: is created where it is missing.
        resume_step: lines of later steps, and a torn last one, are removed: they are made again.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._stream = open(path, "a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it is in the operating system's hands when this returns."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        """Put everything on disk, before a checkpoint says that it is there."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a torn last line is left out.

    Raises:
        RunError: a line is no object with a step.
    """
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            break  # torn by a kill; nothing follows it
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise RunError(
                f"{path} is damaged: its line {len(lines) + 1} is no object with a step; remove "
                "that line"
            )
        lines.append(line)
    return lines


class Metrics:
    """Rank 0's metrics: JSON lines and TensorBoard events.

    Args:
        output_dir: the run's folder.
        resume_step: steps done before this start.
    """

    def __init__(self, output_dir: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._lines = JsonLines(output_dir / METRICS, resume_step=resume_step)
        self._events = SummaryWriter(str(output_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, and one event a number."""
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put everything on disk."""
        self._lines.sync()
        self._events.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._events.close()
