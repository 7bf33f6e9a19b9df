"""One run: a student, what it learns from, and what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.checkpoint import Checkpoints, State
from pipeline.collectives import on_rank_0
from pipeline.config import Recipe
from pipeline.engine import Engine, StepResult
from pipeline.export import export_student
from pipeline.heldout import heldout_losses
from pipeline.loader import Batch, Loader
from pipeline.metrics import JsonLines, Metrics
from pipeline.objectives import Compared, DistillationObjective
from pipeline.report import write_report
from pipeline.spikes import is_spike, remember, warn_of_spike
from pipeline.stopping import StopRequest
from pipeline.stragglers import FEWEST_STEPS, seconds_of_ranks, slowest, warn_of_straggler
from pipeline.topology import Topology


@dataclasses.dataclass(kw_only=True)
class Run:
    """All that the loop works with. `state` moves on with every step; the rest stays.

    Runs of several students share topology, device, stop, loader, held-out rows and the teacher,
    whose pass over a batch is made when the first of them asks for it. Only rank 0 has `metrics`;
    `row_log` is None unless data.row_log is set.
    """

    recipe: Recipe
    topology: Topology
    device: torch.device
    stop: StopRequest
    loader: Loader
    heldout: dict[str, list[Batch]]
    objective: DistillationObjective
    teacher: Callable[[Batch], Compared]
    teacher_weights: Callable[[], list[torch.Tensor]]
    engine: Engine
    checkpoints: Checkpoints
    metrics: Metrics | None
    row_log: JsonLines | None
    state: State
    bar: tqdm[Any]
    hosts: Sequence[str]  # by rank
    seconds: float = 0.0  # of training since the last log line
    own_seconds: float = 0.0  # of these, in which this rank waited for no other
    tokens_logged: int = 0
    steps_logged: int = 0

    def __post_init__(self) -> None:
        self.checkpoints.on_failure = self._log_failed_saves

    def _log_failed_saves(self, failed_saves: int) -> None:
        if self.metrics is not None:
            self.metrics.write(self.state.step, {"failed_saves": failed_saves})

    def loss(self, means: Sequence[float]) -> float:
        """What is minimised, from its terms."""
        weights = self.objective.weights
        return sum(weights[term] * mean for term, mean in zip(weights, means, strict=True))

    def leaves_out(self, loss: float) -> bool:
        """Whether the step's loss, the same on all ranks, forbids to learn from it; warns of it."""
        watch, recent = self.recipe.watch, self.state.recent_losses
        if not is_spike(loss, recent, watch):
            return False
        leaves_out = watch.on_loss_spike == "skip"
        if self.topology.rank == 0:
            batch_size = self.recipe.train.batch_size
            first = self.state.step * batch_size
            rows = list(self.loader.order.row_ids(range(first, first + batch_size)))
            where = f"{self.recipe.output_dir}, step {self.state.step + 1}"
            warn_of_spike(where, loss, recent, rows, leaves_out=leaves_out)
        return leaves_out

    def advance(self, num_tokens: int, loss: float, seconds: float, own_seconds: float) -> None:
        """Count a step that is done."""
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + num_tokens,
            recent_losses=remember(loss, self.state.recent_losses, self.recipe.watch),
        )
        self.seconds += seconds
        self.own_seconds += own_seconds
        self.bar.update()

    def log(self, means: Sequence[float], rate: float, result: StepResult) -> None:
        """Write the step's metrics, and name a rank that keeps the others waiting.

        Args:
            means: the terms of the step's loss.
            rate: the step's learning rate.
            result: what the engine says of the step.
        """
        loss = self.loss(means)
        tokens = self.state.tokens - self.tokens_logged
        rank, world_size = self.topology.rank, self.topology.world_size
        steps = self.state.step - self.steps_logged
        of_ranks = seconds_of_ranks(self.own_seconds / steps, rank, world_size, self.device)
        if self.metrics is not None:
            straggler, most, median = slowest(of_ranks)
            if steps >= FEWEST_STEPS:
                percent = self.recipe.watch.straggler_percent
                warn_of_straggler(self.state.step, of_ranks, self.hosts, percent)
            self.metrics.write(
                self.state.step,
                {
                    "loss": loss,
                    **{
                        f"loss_{term}": mean
                        for term, mean in zip(self.objective.weights, means, strict=True)
                    },
                    "lr": rate,
                    "grad_norm": result.grad_norm if result.applied else None,
                    "tokens": self.state.tokens,
                    "tokens_per_second": round(tokens / self.seconds, 1),
                    "own_ms_median": round(median * 1e3, 3),
                    "own_ms_slowest": round(most * 1e3, 3),
                    "slowest_rank": straggler,
                },
            )
        self.bar.set_postfix(loss=f"{loss:.4f}")
        self.tokens_logged, self.steps_logged = self.state.tokens, self.state.step
        self.seconds = self.own_seconds = 0.0

    def evaluate(self) -> None:
        """Write the held-out loss of every language."""
        if self.heldout:
            losses = heldout_losses(
                self.engine,
                self.teacher,
                self.heldout,
                self.objective,
                self.topology,
                self.device,
            )
            if self.metrics is not None:
                self.metrics.write(self.state.step, losses)

    def save(self) -> None:
        """Begin a checkpoint of the state, after everything that it may stand for is on disk."""
        for log in (self.metrics, self.row_log):
            if log is not None:
                log.sync()
        self.checkpoints.save(self.engine, self.state)

    def finish(self) -> None:
        """Wait for the last checkpoint, then export the student and write the report."""
        self.checkpoints.finish()
        self.bar.close()
        on_rank_0(lambda: finish(self.recipe, self.state))


def finish(recipe: Recipe, state: State) -> None:
    """What a trained run leaves for people: the student and the report."""
    output_dir = Path(recipe.output_dir)
    export_student(recipe, output_dir, state)
    write_report([output_dir])
    print(f"finished: {output_dir}/student, {output_dir}/report.html")
