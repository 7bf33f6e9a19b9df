"""Peak memory of a training step beyond what is held between steps: ours against a padded loop.

    python benchmarks/peak_memory.py [--shape large] [--json]

Each in a new process, after one step that creates the optimizer's state. `held` is what stays
between steps: weights, optimizer state and, on a CPU, the interpreter with its libraries. The
padded loop is that of `step_vs_padded.py`; both take the same number of paragraphs to a
micro-batch, so that they hold the same text.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import (
    arguments,
    device,
    held_bytes,
    in_fresh_process,
    peak_bytes,
    report,
)
from benchmarks.padded import PaddedLoop
from benchmarks.workload import (
    SHAPES,
    add_shape_arguments,
    make_recipe,
    make_run,
    save_teacher,
    scratch,
    segments,
    training_batches,
)
from pipeline.loop import train_step

CASES = {"padded fp32": torch.float32, "padded bf16": torch.bfloat16, "ours": None}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step takes."""

    shape: str
    batches: int
    rows: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case, report."""
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=2, rows_per_batch=12)
    options = parser.parse_args(argv)
    step = Step(options.shape, options.batches, options.rows)
    with scratch() as name:
        save_teacher(SHAPES[options.shape], Path(name) / "teacher")
        measured = {case: in_fresh_process(measure, case, step, Path(name)) for case in CASES}
    rows = [
        {
            "step": case,
            "held MiB": held / 2**20,
            "peak beyond, MiB": peak / 2**20,
            "peak / ours": peak / measured["ours"][1],
        }
        for case, (held, peak) in measured.items()
    ]
    report(
        "peak_memory",
        rows,
        ("padded bf16 / ours, peak memory of a step", rows[1]["peak / ours"]),
        options,
        shape={"name": options.shape, **dataclasses.asdict(SHAPES[options.shape])},
        batches=options.batches,
        rows_per_batch=options.rows,
    )


def measure(case: str, step: Step, folder: Path) -> tuple[int, int]:
    """Bytes held between steps, and what a step needs beyond them at its peak."""
    shape = SHAPES[step.shape]
    batches = training_batches(shape, batches=step.batches, rows_per_batch=step.rows)
    recipe = make_recipe(shape, folder, batches=step.batches, rows_per_batch=step.rows)
    if dtype := CASES[case]:
        texts = segments(batches)
        loop = PaddedLoop(recipe, dtype, device(), sequences=-(-len(texts) // step.batches))
        call = functools.partial(loop.step, texts)
    else:
        call = functools.partial(train_step, [make_run(recipe, batches)])
    call()
    peak = peak_bytes(call)
    return held_bytes(), peak


if __name__ == "__main__":
    main()
