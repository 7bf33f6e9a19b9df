"""Tokens per second on 1, 2, 4 ranks of this host, and a projection to many GPUs.

    python benchmarks/scaling.py [--ranks 1 2 4] [--oversubscribe] [--flops 4e14] [--json]

Measured: every rank trains on as many rows of its own, started by the `deepspeed` launcher; on a
CPU each has one thread. The parallel efficiency is tokens/s over ranks times tokens/s of one.

Projected: a step on 8 to 512 GPUs is the compute time that --flops gives, and then what ZeRO sends.
An all-reduce of S bytes in a ring of n takes 2 (n - 1) / n * S / bandwidth, an all-gather half of
that; latency is left out. The bandwidth is that of a GPU's links within a node, and across nodes
that of a whole node's network, which a ring fills. DeepSpeed reduces gradients with an all-reduce,
at stage 1 once a step, at stage 2 after each micro-batch (those of the word embeddings once, see
pipeline/embedding.py), and gathers the weights in bf16 once.
--overlap is the share of the all-reduce that hides behind the backward pass; the ds_configs here
let none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import arguments, interleaved, print_table, report, set_threads
from benchmarks.workload import (
    LARGE,
    SHAPES,
    Shape,
    add_shape_arguments,
    make_recipe,
    make_run,
    paragraphs,
    save_teacher,
    scratch,
    step_flops,
    student_parameters,
    training_batches,
)
from pipeline.config import ROOT
from pipeline.hardware import Network
from pipeline.loop import train_step

GPUS = (8, 16, 32, 128, 512)
COMMUNICATION = {"fp32": 4, "bf16": 2}  # bytes of a gradient's element
WEIGHT_BYTES = 2  # gathered in bf16


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, project, report; or be one rank of a measurement."""
    options = _parser().parse_args(argv)
    if options.rank_of is not None:
        run_rank(options)
        return
    slots = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    fitting = [ranks for ranks in options.ranks if ranks <= slots or options.oversubscribe]
    skipped = [ranks for ranks in options.ranks if ranks not in fitting]
    if not fitting:
        raise SystemExit(f"{slots} devices or cores are fewer than any of --ranks; ask for less")
    set_threads(1)
    with scratch() as name:
        save_teacher(SHAPES[options.shape], Path(name) / "teacher")
        measured = {ranks: measure(options, Path(name), ranks) for ranks in fitting}
    alone = measured[fitting[0]] / fitting[0]
    rows = [
        {
            "ranks": ranks,
            "tokens/s": speed,
            "tokens/s a rank": speed / ranks,
            "parallel efficiency": speed / ranks / alone,
        }
        for ranks, speed in measured.items()
    ]
    network = Network(
        ranks_per_node=options.gpus_per_node,
        rank_bytes=1e9 * options.gpu_gbytes,
        node_bytes=1e9 * options.node_gbytes,
        overlap=options.overlap,
    )
    projected = projection(network, options.tokens, options.micro_batches, options.flops)
    title = f"parallel efficiency of {fitting[-1]} ranks"
    report(
        "scaling",
        rows,
        (title, rows[-1]["parallel efficiency"]),
        options,
        shape=options.shape,
        skipped_ranks=skipped,
        slots=slots,
        projection={
            "conditions": {
                **dataclasses.asdict(network),
                "tokens_per_gpu_and_step": options.tokens,
                "micro_batches": options.micro_batches,
                "flops": options.flops,
                "student_parameters": student_parameters(LARGE)[0],
            },
            "rows": projected,
        },
    )
    if not options.json:
        if skipped:
            print(f"skipped {skipped} ranks: there are {slots} (see --oversubscribe)")
        print_table(
            f"projection, not measured: large shape, {options.tokens:,} tokens a GPU and step, "
            f"{options.micro_batches} micro-batches, {options.flops:.3g} FLOP/s, "
            f"{options.overlap:.0%} of the all-reduce overlapped",
            projected,
        )


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=2, rows_per_batch=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="to measure")
    parser.add_argument(
        "--oversubscribe", action="store_true", help="measure more ranks than cores or GPUs too"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    projected = parser.add_argument_group("projection")
    projected.add_argument(
        "--flops", type=float, default=4e14, help="that a GPU reaches in a step; mfu.py measures it"
    )
    projected.add_argument("--tokens", type=int, default=32768, help="of a GPU and step")
    projected.add_argument("--micro_batches", type=int, default=2, help="of a GPU and step")
    projected.add_argument("--gpus_per_node", type=int, default=8)
    projected.add_argument("--gpu_gbytes", type=float, default=400, help="GB/s within a node")
    projected.add_argument("--node_gbytes", type=float, default=100, help="GB/s out of a node")
    projected.add_argument("--overlap", type=float, default=0.0, help="share, 0 to 1")
    parser.add_argument("--rank_of", type=Path, help=argparse.SUPPRESS)
    return parser


def measure(options: argparse.Namespace, folder: Path, ranks: int) -> float:
    """Tokens a second of all ranks together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    command = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(port)]
    command += ["--no_local_rank", str(Path(__file__).resolve()), "--rank_of", str(folder)]
    for key in ("shape", "batches", "rows", "repeats"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{done.stdout}{done.stderr}")
    return json.loads((folder / f"speed-{ranks}.json").read_text("utf-8"))


def run_rank(options: argparse.Namespace) -> None:
    """Be a rank: train on rows of its own; rank 0 leaves the speed of all in the folder."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = training_batches(
        SHAPES[options.shape], batches=options.batches * ranks, rows_per_batch=options.rows
    )
    recipe = make_recipe(
        SHAPES[options.shape],
        options.rank_of,
        batches=options.batches * ranks,
        rows_per_batch=options.rows,
    )
    run = make_run(recipe, batches[rank::ranks])
    seconds = interleaved({"step": lambda: train_step([run])}, repeats=options.repeats)["step"]
    if rank == 0:
        speed = sum(batch.num_tokens for batch in batches) / seconds
        (options.rank_of / f"speed-{ranks}.json").write_text(json.dumps(speed), "utf-8")


def projection(
    network: Network, tokens: int, micro_batches: int, flops: float
) -> list[dict[str, str | float]]:
    """Step times of the large shape, every GPU with the same number of tokens."""
    parameters, words = student_parameters(LARGE)
    compute = tokens * flops_per_token(LARGE) / flops
    rows: list[dict[str, str | float]] = []
    for stage in (1, 2):
        for dtype, size in COMMUNICATION.items():
            for gpus in GPUS:
                reduce, gather = network.step_seconds(
                    gpus,
                    stage=stage,
                    parameters=parameters,
                    words=words,
                    micro_batches=micro_batches,
                    gradient_bytes=size,
                    weight_bytes=WEIGHT_BYTES,
                )
                step = compute + reduce + gather
                rows.append(
                    {
                        "ZeRO stage": stage,
                        "gradients": dtype,
                        "GPUs": gpus,
                        "compute ms": 1e3 * compute,
                        "all-reduce ms": 1e3 * reduce,
                        "all-gather ms": 1e3 * gather,
                        "step ms": 1e3 * step,
                        "efficiency": compute / step,
                        "million tokens/s": gpus * tokens / step / 1e6,
                    }
                )
    return rows


def flops_per_token(shape: Shape) -> float:
    """Of the cut models, for paragraphs of usual lengths."""
    lengths = [len(text) for text in paragraphs(shape, 1000)]
    return step_flops(shape, lengths) / sum(lengths)


if __name__ == "__main__":
    main()
