"""One run: a student, what it learns from, and what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.checkpoint import Checkpoints, State
from pipeline.collectives import all_sum, on_rank_0
from pipeline.config import Recipe
from pipeline.engine import Engine, StepResult
from pipeline.export import export_student
from pipeline.heldout import heldout_losses
from pipeline.loader import Batch, Loader
from pipeline.metrics import JsonLines, Metrics
from pipeline.objectives import Compared, DistillationObjective
from pipeline.report import write_report
from pipeline.stopping import StopRequest
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
    engine: Engine
    checkpoints: Checkpoints
    metrics: Metrics | None
    row_log: JsonLines | None
    state: State
    bar: tqdm[Any]
    seconds: float = 0.0  # of training since the last log line
    tokens_logged: int = 0

    def __post_init__(self) -> None:
        self.checkpoints.on_failure = self._log_failed_saves

    def _log_failed_saves(self, failed_saves: int) -> None:
        if self.metrics is not None:
            self.metrics.write(self.state.step, {"failed_saves": failed_saves})

    def advance(self, num_tokens: int, seconds: float) -> None:
        """Count a step that is done."""
        self.state = dataclasses.replace(
            self.state, step=self.state.step + 1, tokens=self.state.tokens + num_tokens
        )
        self.seconds += seconds
        self.bar.update()

    def log(self, parts: torch.Tensor, rate: float, result: StepResult) -> None:
        """Write the step's metrics.

        Args:
            parts: [terms] float64, what this rank adds to the step's losses.
            rate: the step's learning rate.
            result: what the engine says of the step.
        """
        weights = self.objective.weights
        losses = dict(zip(weights, all_sum(parts).tolist(), strict=True))
        loss = sum(weights[term] * mean for term, mean in losses.items())
        tokens = self.state.tokens - self.tokens_logged
        if self.metrics is not None:
            self.metrics.write(
                self.state.step,
                {
                    "loss": loss,
                    **{f"loss_{term}": mean for term, mean in losses.items()},
                    "lr": rate,
                    "grad_norm": result.grad_norm if result.applied else None,
                    "tokens": self.state.tokens,
                    "tokens_per_second": round(tokens / self.seconds, 1),
                },
            )
        self.bar.set_postfix(loss=f"{loss:.4f}")
        self.tokens_logged, self.seconds = self.state.tokens, 0.0

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
