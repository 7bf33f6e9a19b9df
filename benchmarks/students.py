"""Two students in one pass of the teacher, against one and what the second adds by itself.

    python benchmarks/students.py [--json]

Timed in turn: a step of one student; a step of the second one whose targets are there already, its
own part; and a step of both. The bar is both <= 1.05 x (one + own part). CPU seconds of one thread
unless there is a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import arguments, report, set_threads, synchronize
from benchmarks.workload import (
    SHAPES,
    add_shape_arguments,
    make_recipe,
    make_run,
    save_teacher,
    scratch,
    training_batches,
)
from pipeline.loader import Batch
from pipeline.loop import train_step
from pipeline.models import Target, load_teacher
from pipeline.objectives import QKV


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, report."""
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=1, rows_per_batch=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    options = parser.parse_args(argv)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    set_threads(None if torch.cuda.is_available() else 1)
    shape = SHAPES[options.shape]
    batches = training_batches(shape, batches=options.batches, rows_per_batch=options.rows)
    with scratch() as name:
        folder = Path(name)
        save_teacher(shape, folder / "teacher")
        recipe = make_recipe(shape, folder, batches=options.batches, rows_per_batch=options.rows)
        first = make_run(recipe, batches)
        target = Target(QKV, shape.teacher_layer)
        shared = functools.partial(load_teacher(recipe, first.device, [target]).of, target)
        first = dataclasses.replace(first, teacher=shared)
        second = dataclasses.replace(make_run(recipe, batches), teacher=shared)
        alone = dataclasses.replace(second, teacher=_Remembered(shared))
        cases: dict[str, Callable[[], Any]] = {
            "one student": lambda: train_step([first]),
            "the second one's own part": lambda: train_step([alone]),
            "two students": lambda: train_step([first, second]),
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for repeat in range(options.repeats + 1):  # the first warms up
            for case, call in cases.items():
                started = clock()
                call()
                synchronize()
                if repeat:
                    seconds[case].append(clock() - started)
    medians = {case: statistics.median(found) for case, found in seconds.items()}
    one, own, both = medians.values()
    report(
        "students",
        [{"step": case, "ms": 1e3 * median} for case, median in medians.items()],
        ("two students / (one + the second one's own part)", both / (one + own)),
        options,
        shape={"name": options.shape, **dataclasses.asdict(shape)},
        tokens=sum(batch.num_tokens for batch in batches),
    )


class _Remembered:
    """The teacher's outputs of each batch, computed the first time."""

    def __init__(self, teacher: Callable[[Batch], Any]) -> None:
        self._teacher, self._outputs = teacher, {}

    def __call__(self, batch: Batch) -> Any:
        if batch.first_position not in self._outputs:
            self._outputs[batch.first_position] = self._teacher(batch)
        return self._outputs[batch.first_position]


if __name__ == "__main__":
    main()
