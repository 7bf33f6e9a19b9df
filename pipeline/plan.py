"""What a run will need, before it starts: memory, time, disk, energy and money.

    python -m pipeline.plan R.yaml --gpu 80GB --nodes 4 [--deepspeed ds_configs/zero2.json]
    python -m pipeline.plan R.yaml --gpu_name H100 --nodes 4
    python -m pipeline.plan R.yaml --gpu 24GB --matmul_tflops 90 --gpus 1 8 64
    python -m pipeline.plan R.yaml --cpu [--nodes 2] [--cores 32] [--matmul_tflops 7]

Models are counted from their config.json; no weights are loaded. With --gpus the largest
train.micro_batch_size that fits is taken for every number of GPUs; otherwise the recipe's is, or
where that does not fit the largest that does, with a warning. docs/scaling.md says what is assumed,
and how far predictions were from measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from data_prep.command import (
    EXIT_FINISHED,
    ConfigError,
    OptionParser,
    run_command,
    skip_unreachable_hub,
)
from pipeline.config import (
    DEFAULT_DS_CONFIG,
    Recipe,
    check_layer,
    divisors,
    load_recipes,
    read_ds_config,
)

SHARES = {"cuda": 0.55, "cpu": 0.77}  # of a plain product's rate; the GPU's is assumed
CPU_BANDWIDTH = 12.8e9  # bytes a second of an optimizer step on two cores: benchmarks/mfu.py
CPU_NETWORK = 0.22e9  # bytes a second between ranks of one host, gloo: benchmarks/scaling.py
UPDATE_BYTES = 42  # read and written a parameter: norm, clipping, AdamW, weights in bf16
DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """What ranks run on.

    Args:
        device: "cuda" or "cpu".
        memory: bytes of a rank.
        flops: a second, that a rank reaches in the models' products.
        memory_bandwidth: bytes a second of a rank.
        network: that connects the ranks.
        disk: bytes a second to which all ranks write together.
        watts: of a rank at most; None is unknown.
        price: of a rank and hour; None is unknown.
        assumptions: in words.
    """

    device: str
    memory: float
    flops: float
    memory_bandwidth: float
    network: Any
    disk: float
    watts: float | None
    price: float | None
    assumptions: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is predicted for one number of ranks; bytes and seconds.

    `memory` is of a rank at its fullest moment, by what it is for; `step_seconds` the sum of the
    three before it; `tokens` those of a step, of rows without padding.
    """

    ranks: int
    micro_batch_size: int
    accumulation_steps: int
    memory: dict[str, float]
    memory_bytes: float
    memory_limit: float
    compute_seconds: float
    optimizer_seconds: float
    communication_seconds: float
    step_seconds: float
    tokens: int
    tokens_per_second: float
    compute_share: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    checkpoint_share: float
    disk_bytes: float
    days: float
    rank_hours: float
    kilowatt_hours: float | None
    price: float | None


class Planner:
    """Predicts runs of a recipe.

    Args:
        recipes: of the students that learn from one pass of the teacher: one or several.
        ds_policy: from `read_ds_config`.

    Raises:
        ConfigError: the models, the objective and the policy do not fit together.
    """

    def __init__(self, recipes: Sequence[Recipe], ds_policy: dict[str, Any]) -> None:
        # They load torch and transformers: a typo is refused before.
        from pipeline.engine import merge_ds_config
        from pipeline.flops import size_of
        from pipeline.footprint import Policy, Trained
        from pipeline.models import cut_config, meta_encoder, read_config, student_config
        from pipeline.objectives import build_objective

        self.recipe = recipes[0]
        source = self.recipe.teacher.model
        of_teacher = read_config("teacher.model", source, with_weights=False)
        self.students: list[Trained] = []
        for recipe in recipes:
            config = student_config(recipe.student, of_teacher)
            check_layer(recipe, of_teacher.num_hidden_layers)
            objective = build_objective(recipe, of_teacher, config)
            student = recipe.student
            self.students.append(
                Trained(
                    size=size_of(meta_encoder(config, objective.needs, objective.projections)),
                    objective=objective,
                    policy=Policy.of(merge_ds_config(ds_policy, recipe, 1)),
                    has_dropout=student.hidden_dropout_prob > 0,
                )
            )
        last = max(recipe.teacher.layer or of_teacher.num_hidden_layers for recipe in recipes)
        needs = self.students[0].objective.teacher_needs
        self.teacher = size_of(meta_encoder(cut_config(of_teacher, last), needs))

    def memory(self, micro_batch_size: int, ranks: int, device: str) -> dict[str, float]:
        """Bytes of a rank at its fullest moment, by what they are for."""
        from pipeline.footprint import footprint

        return footprint(
            self.students,
            self.teacher,
            teacher_dtype=self.recipe.teacher.dtype,
            micro_batch_tokens=micro_batch_size * self.recipe.prep.seq_len,
            ranks=ranks,
            device=device,
        )

    def largest_micro_batch(self, ranks: int, machines: Machines) -> int:
        """The largest divisor of a rank's rows that fits into its memory.

        Raises:
            ConfigError: train.batch_size is no multiple of the ranks, or not even one row fits.
        """
        batch_size = self.recipe.train.batch_size
        if batch_size % ranks:
            fitting = [n for n in divisors(batch_size) if n < ranks]
            raise ConfigError(
                f"train.batch_size={batch_size} is not a multiple of {ranks} ranks, so ranks would "
                f"get unequal shares; use {fitting[-1]} ranks, or "
                f"--train.batch_size {-(-batch_size // ranks) * ranks}"
            )
        for rows in reversed(divisors(batch_size // ranks)):
            if sum(self.memory(rows, ranks, machines.device).values()) <= machines.memory:
                return rows
        remedy = "more memory, more ranks, a higher ZeRO stage or a smaller model"
        raise self._refusal(1, ranks, machines, remedy)

    def micro_batch(self, ranks: int, machines: Machines) -> tuple[int, str | None]:
        """The recipe's micro_batch_size, or where that will not do the largest that does.

        Returns:
            Rows, and why they are not the recipe's; None where they are.

        Raises:
            ConfigError: as `largest_micro_batch`.
        """
        largest = self.largest_micro_batch(ranks, machines)
        rows = self.recipe.train.micro_batch_size
        needed = sum(self.memory(rows, ranks, machines.device).values())
        if needed > machines.memory:
            why = f"needs {needed / 1e9:.1f} GB of a rank's {machines.memory / 1e9:.1f}"
        elif self.recipe.train.batch_size % (rows * ranks):
            why = f"x {ranks} ranks does not divide train.batch_size={self.recipe.train.batch_size}"
        else:
            return rows, None
        return largest, (
            f"train.micro_batch_size={rows} {why}, so training would refuse or fail; planned with, "
            f"and to be run with, --train.micro_batch_size {largest}"
        )

    def _refusal(self, rows: int, ranks: int, machines: Machines, remedy: str) -> ConfigError:
        parts = self.memory(rows, ranks, machines.device)
        largest = max(parts, key=lambda name: parts[name])
        return ConfigError(
            f"train.micro_batch_size={rows} needs {sum(parts.values()) / 1e9:.1f} GB on each of "
            f"{ranks} ranks ({parts[largest] / 1e9:.1f} of them {largest}) and a rank has "
            f"{machines.memory / 1e9:.1f} GB, so the run would end for lack of memory; use "
            f"{remedy}"
        )

    def plan(self, ranks: int, micro_batch_size: int, machines: Machines) -> Plan:
        """The prediction for a number of ranks and a micro_batch_size that divides their rows."""
        recipe, train = self.recipe, self.recipe.train
        memory = self.memory(micro_batch_size, ranks, machines.device)
        tokens = train.batch_size * recipe.prep.seq_len
        accumulation = train.batch_size // (ranks * micro_batch_size)
        compute = self.flops(train.batch_size) / ranks / machines.flops
        parameters = sum(student.size.parameters for student in self.students)
        update = UPDATE_BYTES * parameters / ranks / machines.memory_bandwidth
        communication = self.communication_seconds(ranks, accumulation, machines)
        step = compute + update + communication
        checkpoint = sum(map(_checkpoint_bytes, self.students))
        saving = checkpoint / machines.disk
        seconds = train.max_steps * step + train.max_steps / train.save_every * saving
        hours = ranks * seconds / 3600
        milestones = train.max_steps // train.keep_every if train.keep_every else 0
        return Plan(
            ranks=ranks,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation,
            memory=memory,
            memory_bytes=sum(memory.values()),
            memory_limit=machines.memory,
            compute_seconds=compute,
            optimizer_seconds=update,
            communication_seconds=communication,
            step_seconds=step,
            tokens=tokens,
            tokens_per_second=tokens / step,
            compute_share=(compute + update) / step,
            checkpoint_bytes=checkpoint,
            checkpoint_seconds=saving,
            checkpoint_share=saving / (train.save_every * step + saving),
            # One more than is kept while the next is written; the exported student is in fp32.
            disk_bytes=(train.keep_checkpoints + 1 + milestones) * checkpoint + 4 * parameters,
            days=seconds / DAY,
            rank_hours=hours,
            kilowatt_hours=machines.watts and machines.watts * hours / 1e3,
            price=machines.price and machines.price * hours,
        )

    def flops(self, rows: int) -> float:
        """Matrix products of both models over rows that are one segment each: the most there is."""
        from pipeline.flops import step_flops

        sizes = [student.size for student in self.students]
        lengths = [self.recipe.prep.seq_len] * rows
        return step_flops(self.teacher, sizes, lengths, self.recipe.objective.masks)

    def communication_seconds(
        self, ranks: int, accumulation_steps: int, machines: Machines
    ) -> float:
        """Seconds in which a step's gradients are reduced and its weights gathered."""
        return sum(
            sum(
                machines.network.step_seconds(
                    ranks,
                    stage=student.policy.stage,
                    parameters=student.size.parameters,
                    words=student.size.words,
                    micro_batches=accumulation_steps,
                    gradient_bytes=student.policy.communicated,
                    weight_bytes=student.policy.element,
                )
            )
            for student in self.students
        )


def _checkpoint_bytes(student: Any) -> float:
    """The weights that train, and the optimizer's: fp32 weights and two moments."""
    return float((student.policy.element + 12) * student.size.parameters)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, as a table or as JSON."""
    options, arguments = _parser().parse_known_args(argv)
    recipes, others = load_recipes(["--config", options.recipe, *arguments])
    if options.gpus and options.nodes:
        raise ConfigError("--gpus and --nodes both say how many GPUs there are; leave one out")
    skip_unreachable_hub(recipes[0].teacher.model)
    policy = read_ds_config(others.deepspeed)
    machines = cpu_machines(options) if options.cpu else gpu_machines(options)
    planner = Planner(recipes, policy)
    if options.gpus:
        sizes = [(ranks, planner.largest_micro_batch(ranks, machines)) for ranks in options.gpus]
    else:
        ranks = (options.nodes or 1) * machines.network.ranks_per_node
        rows, why_not = planner.micro_batch(ranks, machines)
        sizes = [(ranks, rows)]
        if why_not is not None:
            print(f"warning: {why_not}", file=sys.stderr)
    plans = [planner.plan(ranks, rows, machines) for ranks, rows in sizes]
    notes = [*machines.assumptions, *_notes(recipes)]
    if options.json:
        content = {"plans": [dataclasses.asdict(plan) for plan in plans], "assumptions": notes}
        print(json.dumps(content, indent=2))
        return EXIT_FINISHED
    if options.gpus:
        print(comparison(plans))
    else:
        largest = planner.largest_micro_batch(plans[0].ranks, machines)
        print(description(planner, plans[0], largest))
    print("\n".join(f"assumed: {note}" for note in notes))
    return EXIT_FINISHED


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="python -m pipeline.plan",
        description="Predict a run's memory, time, disk and cost. Other arguments are train.py's: "
        f"--deepspeed (default {DEFAULT_DS_CONFIG.name}), and --KEY VALUE of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="YAML; comes first")
    parser.add_argument("--gpu", type=_bytes, metavar="SIZE", help="memory of a GPU, such as 80GB")
    parser.add_argument("--gpu_name", help="for its data sheet, such as H100")
    parser.add_argument("--matmul_tflops", type=_positive, help="that a plain product reaches")
    parser.add_argument("--nodes", type=_count, help="default 1")
    parser.add_argument("--gpus_per_node", type=_count, default=8)
    parser.add_argument("--gpus", type=_count, nargs="+", help="numbers of GPUs to compare")
    parser.add_argument("--cpu", action="store_true", help="one rank a node, on its cores")
    parser.add_argument("--cores", type=_count, help="of a CPU node; default: this host's")
    parser.add_argument("--memory", type=_bytes, help="of a CPU node; default: this host's")
    parser.add_argument(
        "--matmul_share",
        type=_positive,
        help="of the plain product's rate that a step reaches; benchmarks/mfu.py measures it",
    )
    parser.add_argument("--node_gbytes", type=_positive, help="GB/s out of a node; default 100")
    parser.add_argument("--disk_gbytes", type=_positive, default=1.0, help="GB/s of checkpoints")
    parser.add_argument("--price_per_gpu_hour", type=_positive, help="in any currency")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GB or 74.5GiB")
    return float(found[1]) * (1e9 if found[2] == "GB" else 2**30)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is below 1")
    return number


def gpu_machines(options: argparse.Namespace) -> Machines:
    """GPUs as the command line describes them.

    Raises:
        ConfigError: it does not say enough, or names a GPU that is not known here.
    """
    from pipeline.hardware import GPUS, MATMUL_OF_DATA_SHEET, Network

    known = GPUS.get(options.gpu_name) if options.gpu_name else None
    if options.gpu_name and known is None:
        raise ConfigError(
            f"--gpu_name {options.gpu_name!r} is not known here; use one of {', '.join(GPUS)}, or "
            "give --gpu and --matmul_tflops"
        )
    if known is None and not options.gpu:
        raise ConfigError(
            "neither --gpu nor --gpu_name says what a GPU has, so nothing can be told of it; give "
            f"its memory, such as --gpu 80GB, or --gpu_name with one of {', '.join(GPUS)}"
        )
    name = options.gpu_name or slowest_gpu(options.gpu)
    sheet = GPUS[name]
    share = options.matmul_share or SHARES["cuda"]
    assumptions = []
    if options.matmul_tflops:
        peak = 1e12 * options.matmul_tflops
    else:
        peak = MATMUL_OF_DATA_SHEET * sheet.dense_flops
        assumptions.append(
            f"a plain bf16 product reaches {MATMUL_OF_DATA_SHEET:.0%} of the data sheet's "
            f"{sheet.dense_flops / 1e12:.0f} TFLOP/s (--matmul_tflops gives a measured one)"
        )
    if known is None:
        assumptions.append(
            f"it is as fast as an {name}, the slowest known with that much memory (--gpu_name says "
            "which it is)"
        )
    if options.matmul_share is None:
        assumptions.append(
            f"a step reaches {share:.0%} of that; no GPU has been measured (--matmul_share gives "
            "what benchmarks/mfu.py prints)"
        )
    node = 1e9 * (options.node_gbytes or 100.0)
    assumptions.append(
        f"{sheet.link_bandwidth / 1e9:.0f} GB/s between the GPUs of a node, {node / 1e9:g} GB/s "
        "out of a node, rings without latency, nothing hidden behind the backward pass"
    )
    return Machines(
        device="cuda",
        memory=options.gpu or sheet.memory,
        flops=share * peak,
        memory_bandwidth=sheet.memory_bandwidth,
        network=Network(
            ranks_per_node=options.gpus_per_node,
            rank_bytes=sheet.link_bandwidth,
            node_bytes=node,
            overlap=0.0,
        ),
        disk=1e9 * options.disk_gbytes,
        watts=sheet.watts,
        price=options.price_per_gpu_hour,
        assumptions=assumptions,
    )


def slowest_gpu(memory: float) -> str:
    """The slowest GPU that is known with `memory` bytes; the one with most where none has them."""
    from pipeline.hardware import GPUS

    enough = [name for name, gpu in GPUS.items() if gpu.memory >= memory]
    if not enough:
        return max(GPUS, key=lambda name: GPUS[name].memory)
    return min(enough, key=lambda name: GPUS[name].dense_flops)


def cpu_machines(options: argparse.Namespace) -> Machines:
    """CPU nodes like this host, unless the command line says otherwise.

    Raises:
        ConfigError: a GPU is named too.
    """
    if options.gpu or options.gpu_name or options.gpus:
        raise ConfigError("--cpu plans for CPUs, and --gpu, --gpu_name or --gpus for GPUs; use one")
    import torch

    from pipeline.hardware import Network, matmul_peak

    here = len(os.sched_getaffinity(0))
    cores = options.cores or here
    share = options.matmul_share or SHARES["cpu"]
    assumptions = [f"a step reaches {share:.0%} of a plain product's rate, as on the host measured"]
    if options.matmul_tflops:
        peak = 1e12 * options.matmul_tflops
    else:
        peak = matmul_peak(torch.bfloat16) * cores / here
        assumptions.append(
            f"a plain bf16 product reaches {peak / 1e12:.3g} TFLOP/s on {cores} cores, from what "
            f"{here} cores of this host just did: less than it can if it is busy"
        )
    node = 1e9 * options.node_gbytes if options.node_gbytes else CPU_NETWORK
    assumptions.append(f"{node / 1e9:g} GB/s between ranks")
    return Machines(
        device="cpu",
        memory=options.memory or float(psutil.virtual_memory().total),
        flops=share * peak,
        memory_bandwidth=CPU_BANDWIDTH * cores / 2,
        network=Network(ranks_per_node=1, rank_bytes=node, node_bytes=node, overlap=0.0),
        disk=1e9 * options.disk_gbytes,
        watts=None,
        price=options.price_per_gpu_hour,
        assumptions=assumptions,
    )


def _notes(recipes: Sequence[Recipe]) -> list[str]:
    notes = ["every row is full, and one segment: shorter ones need less attention"]
    if any(recipe.student.vocabulary != "full" for recipe in recipes):
        notes.append("the student has the whole vocabulary: what student.vocabulary drops is saved")
    return notes


def description(planner: Planner, plan: Plan, largest: int) -> str:
    """One plan for people."""
    recipe, teacher = planner.recipe, planner.teacher
    policy = planner.students[0].policy
    trained = ", ".join(f"{s.size.parameters / 1e6:.1f} M" for s in planner.students)
    steps = recipe.train.max_steps
    rows = [
        ("teacher", f"{recipe.teacher.model}, {teacher.parameters / 1e6:.1f} M parameters are run"),
        ("student", f"{trained} parameters train, ZeRO {policy.stage}"),
        (
            "batch",
            f"{recipe.train.batch_size} rows of {recipe.prep.seq_len} on {plan.ranks} ranks: "
            f"{plan.accumulation_steps} x {plan.micro_batch_size} rows each; at most {largest} fit",
        ),
        (
            "memory",
            f"{plan.memory_bytes / 1e9:.1f} of {plan.memory_limit / 1e9:.1f} GB on each rank",
        ),
        *((f"  {name}", f"{size / 1e9:.2f} GB") for name, size in plan.memory.items() if size),
        (
            "step",
            f"{plan.step_seconds:.3g} s: models {plan.compute_seconds:.3g}, optimizer "
            f"{plan.optimizer_seconds:.3g}, network {plan.communication_seconds:.3g}",
        ),
        (
            "speed",
            f"{plan.tokens_per_second:,.0f} tokens/s, computing {plan.compute_share:.0%} of it",
        ),
        (
            "checkpoint",
            f"{plan.checkpoint_bytes / 1e9:.2f} GB in {plan.checkpoint_seconds:.1f} s every "
            f"{recipe.train.save_every} steps, {plan.checkpoint_share:.1%} of the time",
        ),
        ("disk", f"{plan.disk_bytes / 1e9:.1f} GB in output_dir"),
        (
            "run",
            f"{steps:,} steps, {steps * plan.tokens / 1e9:,.3g} billion tokens: {plan.days:.2f} "
            f"days, {plan.rank_hours:,.0f} rank hours",
        ),
    ]
    if plan.kilowatt_hours:
        rows.append(("energy", f"{plan.kilowatt_hours:,.0f} kWh of the GPUs alone, at their limit"))
    if plan.price:
        rows.append(("price", f"{plan.price:,.0f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def comparison(plans: Sequence[Plan]) -> str:
    """Plans for several numbers of ranks, one a line."""
    head = ("GPUs", "micro batch", "GB each", "step s", "tokens/s", "network", "days", "GPU hours")
    lines = ["".join(f"{name:>13}" for name in head)]
    for plan in plans:
        cells = (
            f"{plan.ranks:,}",
            f"{plan.accumulation_steps} x {plan.micro_batch_size}",
            f"{plan.memory_bytes / 1e9:.1f}",
            f"{plan.step_seconds:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.communication_seconds / plan.step_seconds:.0%}",
            f"{plan.days:.2f}",
            f"{plan.rank_hours:,.0f}",
        )
        lines.append("".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
