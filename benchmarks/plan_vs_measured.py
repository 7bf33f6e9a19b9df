"""What pipeline/plan.py predicts against what was measured: memory, and time of a step.

    python benchmarks/plan_vs_measured.py [--recorded] [--json]

Memory is measured here, each case in a new process (`peak_memory.py` says how); --recorded takes it
from benchmarks/results/ instead, as the times are: those of mfu.py, step_vs_padded.py, students.py
and scaling.py. The plan is told the rate of a plain product that was measured with them; of one
thread half of two threads' is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    RESULTS,
    arguments,
    held_bytes,
    in_fresh_process,
    peak_bytes,
    print_table,
    report,
)
from benchmarks.workload import (
    BASE,
    Shape,
    make_recipe,
    make_run,
    save_teacher,
    scratch,
    teacher_config,
    training_batches,
)
from pipeline.config import ROOT, Recipe, read_ds_config
from pipeline.hardware import Network
from pipeline.loop import train_step
from pipeline.plan import CPU_BANDWIDTH, CPU_NETWORK, SHARES, Machines, Plan, Planner

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one rank: the student, the policy, micro-batches and their rows."""

    layers: int = 6
    width: int = 384
    policy: str = "zero2"
    batches: int = 2
    rows: int = 4

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.policy}, {self.layers} x {self.width}, {self.batches} x {self.rows} rows"

    @property
    def shape(self) -> Shape:
        """The base shape with this student."""
        return dataclasses.replace(BASE, student_layers=self.layers, student_width=self.width)

    @property
    def ds_config(self) -> Path:
        """The DeepSpeed JSON."""
        return ROOT / "ds_configs" / f"{self.policy}.json"


CASES = (
    Case(policy="zero1"),
    Case(rows=32),
    Case(layers=12, width=768, rows=16),
    Case(policy="zero3", rows=16),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure memory or look it up, look up times, predict both, report."""
    parser = arguments(__doc__)
    parser.add_argument("--recorded", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    if options.recorded:
        print_table("predicted and measured", recorded_rows())
        return
    rows: list[dict[str, Any]] = []
    with scratch() as name:
        save_teacher(BASE, Path(name) / "teacher")
        for case in CASES:
            held, peak = in_fresh_process(measure, case, Path(name))
            plan = predict(case)
            rows.append(
                {
                    "case": case.name,
                    "held MiB": held / MIB,
                    "peak beyond, MiB": peak / MIB,
                    "predicted MiB": plan.memory_bytes / MIB,
                    "predicted / measured": plan.memory_bytes / (held + peak),
                }
            )
    worst = max((row["predicted / measured"] for row in rows), key=lambda ratio: abs(ratio - 1))
    report("plan_vs_measured", rows, ("predicted / measured, farthest from 1", worst), options)


def measure(case: Case, folder: Path) -> tuple[int, int]:
    """Bytes held between steps, and what a step needs beyond them at its peak."""
    batches = training_batches(case.shape, batches=case.batches, rows_per_batch=case.rows)
    recipe = make_recipe(case.shape, folder, batches=case.batches, rows_per_batch=case.rows)
    call = functools.partial(train_step, [make_run(recipe, batches, case.ds_config)])
    call()
    peak = peak_bytes(call)
    return held_bytes(), peak


def predict(case: Case, *, ranks: int = 1, threads: int = 2, peak: float = 1.0) -> Plan:
    """The plan of a case on so many ranks of so many threads each, with their rate of products."""
    with tempfile.TemporaryDirectory() as name:
        teacher_config(case.shape).save_pretrained(Path(name) / "teacher")
        recipe = make_recipe(
            case.shape, Path(name), batches=case.batches * ranks, rows_per_batch=case.rows
        )
        planner = Planner(
            [_with_rows_of(recipe, BASE.seq_len)], read_ds_config(str(case.ds_config))
        )
    machines = Machines(
        device="cpu",
        memory=float("inf"),
        flops=SHARES["cpu"] * peak,
        memory_bandwidth=CPU_BANDWIDTH * threads / 2,
        network=Network(
            ranks_per_node=ranks, rank_bytes=CPU_NETWORK, node_bytes=CPU_NETWORK, overlap=0.0
        ),
        disk=1e9,
        watts=None,
        price=None,
        assumptions=[],
    )
    return planner.plan(ranks, case.rows, machines)


def _with_rows_of(recipe: Recipe, seq_len: int) -> Recipe:
    return dataclasses.replace(recipe, prep=dataclasses.replace(recipe.prep, seq_len=seq_len))


def recorded(name: str) -> dict[str, Any]:
    """A kept result of a CPU."""
    (path,) = RESULTS.glob(f"{name}.amd-epyc-*.json")
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def recorded_rows() -> list[dict[str, Any]]:
    """Every kept figure that a plan predicts: what, measured, predicted, their ratio."""
    found = {row["case"]: row for row in recorded("plan_vs_measured")["rows"]}
    (ours,) = (row for row in recorded("peak_memory")["rows"] if row["step"] == "ours")
    found[Case().name] = ours
    rows = []
    for case in (Case(), *CASES):
        row = found[case.name]
        measured = row["held MiB"] + row["peak beyond, MiB"]
        rows.append(_row(f"MiB, {case.name}", measured, predict(case).memory_bytes / MIB))
    mfu, against, students = map(recorded, ("mfu", "step_vs_padded", "students"))
    two_threads = mfu["matmul_peak_bf16"]
    whole = predict(Case(rows=32), peak=two_threads)
    rows.append(_row("s a step, mfu.py", mfu["step_seconds"], whole.step_seconds))
    (ours,) = (row for row in against["rows"] if row["step"] == "ours")
    seconds = ours["ms per 1,000 tokens"] * against["tokens"] / 1e6
    step = predict(Case(rows=16), peak=against["matmul_peak_bf16"])
    rows.append(_row("s a step, step_vs_padded.py", seconds, step.step_seconds))
    one_thread = functools.partial(predict, threads=1, peak=two_threads / 2)
    (one,) = (row for row in students["rows"] if row["step"] == "one student")
    rows.append(
        _row(
            "s a step, students.py",
            one["ms"] / 1e3,
            one_thread(Case(batches=1, rows=8)).step_seconds,
        )
    )
    for row in recorded("scaling")["rows"]:
        ranks, plan = row["ranks"], one_thread(Case(rows=16), ranks=row["ranks"])
        what = f"tokens/s, scaling.py, {ranks} ranks"
        rows.append(_row(what, row["tokens/s"], plan.tokens_per_second))
    return rows


def _row(what: str, measured: float, predicted: float) -> dict[str, Any]:
    ratio = predicted / measured
    return {"what": what, "measured": measured, "predicted": predicted, "ratio": ratio}


if __name__ == "__main__":
    main()
