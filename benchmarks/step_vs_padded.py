"""Time of a whole training step per real token: this project against a padded loop, and the floor.

    python benchmarks/step_vs_padded.py [--shape large] [--json]

All take the same paragraphs to one optimizer step, in turn, in one process:

- ours: packed rows through `pipeline.loop.train_step`, with the engine and AdamW;
- padded: `benchmarks/padded.py`, one paragraph a sample padded to the longest of its micro-batch,
  whole teacher, all hidden states and attentions, dense relations; in fp32 as public code ships it,
  and in bf16;
- floor: the matmul FLOPs of the cut models at the bf16 matmul peak measured in the same run.

Before that, the losses of all on these paragraphs, without dropout, must be equal.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import arguments, device, interleaved, report, set_threads
from benchmarks.padded import PaddedLoop
from benchmarks.workload import (
    SHAPES,
    add_shape_arguments,
    make_recipe,
    make_run,
    save_teacher,
    scratch,
    segments,
    step_flops,
    training_batches,
)
from pipeline.engine import Engine
from pipeline.hardware import matmul_peak
from pipeline.loader import Batch
from pipeline.loop import train_step
from pipeline.models import (
    CutEncoder,
    Target,
    TeacherModel,
    build_student,
    load_teacher,
    read_config,
    student_config,
)
from pipeline.objectives import QKV, DistillationObjective
from pipeline.run import Run

FP32_TOLERANCE = 1e-5  # relative, of ours and padded, both in fp32
STEPS_IN_A_TURN = 4
BF16_TOLERANCE = 1e-2  # relative, of a bf16 loss and the fp32 one


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the losses, measure, report."""
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=2, rows_per_batch=16)
    parser.add_argument("--sequences", type=int, default=8, help="padded paragraphs a micro-batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    options = parser.parse_args(argv)
    set_threads(options.threads)
    shape = SHAPES[options.shape]
    batches = training_batches(shape, batches=options.batches, rows_per_batch=options.rows)
    texts = segments(batches)
    lengths = [len(text) for text in texts]
    num_tokens = sum(lengths)
    with scratch() as name:
        folder = Path(name)
        save_teacher(shape, folder / "teacher")
        recipe = make_recipe(shape, folder, batches=options.batches, rows_per_batch=options.rows)
        run = make_run(recipe, batches)
        padded = {
            f"padded {short}": PaddedLoop(recipe, dtype, device(), sequences=options.sequences)
            for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        losses = equal_losses(run, padded, batches, texts)
        cases = {case: lambda loop=loop: loop.step(texts) for case, loop in padded.items()}
        # Several steps a turn, as in training: the first finds the caches full of the other loop.
        cases["ours"] = lambda: [train_step([run]) for _ in range(STEPS_IN_A_TURN)]
        peaks: list[float] = []
        cases["matmul"] = lambda: peaks.append(matmul_peak(torch.bfloat16))  # in turn, as the rest
        seconds = interleaved(cases, repeats=options.repeats)
    del seconds["matmul"]
    seconds["ours"] /= STEPS_IN_A_TURN
    peak = statistics.median(peaks)
    seconds["floor"] = step_flops(shape, lengths) / peak
    rows = [
        {
            "step": case,
            "ms per 1,000 tokens": 1e6 * time / num_tokens,
            "tokens/s": num_tokens / time,
            "time / ours": time / seconds["ours"],
        }
        for case, time in seconds.items()
    ]
    micro_batches = padded["padded bf16"].micro_batches(texts)
    report(
        "step_vs_padded",
        rows,
        ("padded bf16 / ours, time per real token", seconds["padded bf16"] / seconds["ours"]),
        options,
        shape={"name": options.shape, **dataclasses.asdict(shape)},
        tokens=num_tokens,
        paragraphs=len(texts),
        repeats=options.repeats,
        real_tokens_among_padded=num_tokens / sum(ids.numel() for ids, _ in micro_batches),
        losses=losses,
        matmul_peak_bf16=peak,
    )


def equal_losses(
    run: Run,
    padded: dict[str, PaddedLoop],
    batches: Sequence[Batch],
    texts: Sequence[torch.Tensor],
) -> dict[str, float]:
    """Every case's loss before the first step, without dropout.

    Raises:
        SystemExit: one differs by more than the rounding of its dtype.
    """
    run.engine.train(False)
    with torch.no_grad():
        losses = {"ours": _mean_loss(run.objective, run.engine, run.teacher, batches, run.device)}
    run.engine.train(True)
    losses["ours fp32"] = _fp32_loss(run, batches)
    losses |= {case: loop.loss(texts) for case, loop in padded.items()}
    expected = losses["padded fp32"]
    for case, loss in losses.items():
        tolerance = FP32_TOLERANCE if case.endswith("fp32") else BF16_TOLERANCE
        if not abs(loss - expected) <= tolerance * expected:
            raise SystemExit(f"the loss of {case} is {loss}, not {expected} as padded in fp32")
    return losses


def _fp32_loss(run: Run, batches: Sequence[Batch]) -> float:
    """Ours in fp32, without the engine."""
    recipe, device = run.recipe, run.device
    teacher = dataclasses.replace(recipe.teacher, dtype="float32")
    config = student_config(recipe.student, read_config("teacher.model", teacher.model))
    encoder = CutEncoder(build_student(recipe.student, config, recipe.seed)).to(device)
    student = TeacherModel(encoder, [Target(QKV, config.num_hidden_layers)])
    fp32_teacher = load_teacher(dataclasses.replace(recipe, teacher=teacher), device)
    return _mean_loss(run.objective, student, fp32_teacher, batches, device)


def _mean_loss(
    objective: DistillationObjective,
    student: TeacherModel | Engine,
    teacher: TeacherModel,
    batches: Sequence[Batch],
    device: torch.device,
) -> float:
    """The mean over the tokens of all batches."""
    sums = 0.0
    for batch in (batch.to(device) for batch in batches):
        losses = objective.losses(student(batch), teacher(batch), batch)
        sums += float(objective.total(losses)) * batch.num_tokens
    return sums / sum(batch.num_tokens for batch in batches)


if __name__ == "__main__":
    main()
