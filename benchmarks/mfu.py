"""FLOP/s of a training step, as a share of what a plain matmul reaches in the same run.

    python benchmarks/mfu.py [--shape large] [--json]

FLOPs are counted from the shapes: the matmuls of the cut models over the real tokens. What the loss
multiplies is left out of the ratio, and stands in its own row. The parts are timed by calling the
pieces of `pipeline.loop.train_step` one after the other, with a wait for the GPU after each; the
whole step is timed separately, without those waits.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import (
    arguments,
    interleaved,
    report,
    set_threads,
    synchronize,
)
from benchmarks.workload import (
    SHAPES,
    add_shape_arguments,
    make_recipe,
    make_run,
    part_flops,
    save_teacher,
    scratch,
    segments,
    step_flops,
    training_batches,
)
from pipeline.hardware import matmul_peak
from pipeline.loop import train_step
from pipeline.run import Run
from pipeline.schedule import learning_rate


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the step and its parts, report."""
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=2, rows_per_batch=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    parser.add_argument("--compile", action="store_true", help="the layers, with torch.compile")
    parser.add_argument("--teacher_dtype", default="bfloat16", choices=["bfloat16", "float8"])
    options = parser.parse_args(argv)
    set_threads(options.threads)
    shape = SHAPES[options.shape]
    batches = training_batches(shape, batches=options.batches, rows_per_batch=options.rows)
    lengths = [len(text) for text in segments(batches)]
    clock = Clock()
    with scratch() as name:
        folder = Path(name)
        save_teacher(shape, folder / "teacher")
        recipe = make_recipe(
            shape,
            folder,
            batches=options.batches,
            rows_per_batch=options.rows,
            compile=options.compile,
            teacher_dtype=options.teacher_dtype,
        )
        run = make_run(recipe, batches)
        cases = {"whole": lambda: train_step([run]), "parts": lambda: step_in_parts(run, clock)}
        whole = interleaved(cases, repeats=options.repeats)["whole"]
    peak = matmul_peak(torch.bfloat16)
    flops = part_flops(shape, lengths)
    parts = {part: clock.median(part, options.repeats) for part in flops}
    rows = [
        _row(part, seconds, sum(parts.values()), flops[part], peak)
        for part, seconds in parts.items()
    ]
    model_flops = step_flops(shape, lengths)
    rows.append(_row("whole step", whole, whole, model_flops, peak))
    variant = ("_compiled" if options.compile else "") + (
        "_float8" if options.teacher_dtype == "float8" else ""
    )
    report(
        f"mfu{variant}",
        rows,
        ("FLOP/s of the whole step / bf16 matmul peak", model_flops / whole / peak),
        options,
        shape={"name": options.shape, **dataclasses.asdict(shape)},
        tokens=sum(lengths),
        tokens_per_second=sum(lengths) / whole,
        step_seconds=whole,
        repeats=options.repeats,
        compiled=options.compile,
        teacher_dtype=options.teacher_dtype,
        matmul_peak_bf16=peak,
    )


class Clock:
    """Adds up what each part of a step takes."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._since = 0.0

    def start(self) -> None:
        """A step begins."""
        self._steps.append(collections.defaultdict(float))
        synchronize()
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """A part ends here, and the next one begins."""
        synchronize()
        now = time.perf_counter()
        self._steps[-1][part] += now - self._since
        self._since = now

    def median(self, part: str, steps: int) -> float:
        """Seconds of a part in the last steps."""
        return statistics.median(step[part] for step in self._steps[-steps:])


def step_in_parts(run: Run, clock: Clock) -> None:
    """What `train_step` computes, with the time of each part taken."""
    batches = run.loader.micro_batches(run.state.step)
    clock.start()
    for number, batch in enumerate(batches):
        batch = batch.to(run.device)
        targets = run.teacher(batch)
        clock.lap("teacher forward")
        outputs = run.engine(batch)
        clock.lap("student forward")
        loss = run.objective.total(run.objective.losses(outputs, targets, batch))
        clock.lap("loss")
        run.engine.backward(loss)
        clock.lap("backward")
        if number < len(batches) - 1:
            run.engine.between_micro_batches()
            clock.lap("optimizer step")
    run.engine.step(learning_rate(run.state.step, run.recipe.train))
    clock.lap("optimizer step")


def _row(
    part: str, seconds: float, all_seconds: float, flops: float, peak: float
) -> dict[str, str | float]:
    return {
        "part": part,
        "ms": 1e3 * seconds,
        "% of time": 100 * seconds / all_seconds,
        "GFLOP": flops / 1e9,
        "GFLOP/s": flops / seconds / 1e9,
        "% of matmul peak": 100 * flops / seconds / peak,
    }


if __name__ == "__main__":
    main()
