"""The training loop."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from data_prep.command import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    RunError,
)
from pipeline.collectives import agree, all_max, on_rank_0
from pipeline.loader import Batch, Count
from pipeline.schedule import learning_rate

if TYPE_CHECKING:
    from pipeline.run import Run


def train(run: Run, after_step: Callable[[], object]) -> int:
    """The loop: step, log, evaluate, save. Saving comes last, so a checkpoint covers the rest.

    Args:
        run: assembled; its state says where to begin.
        after_step: called after every optimizer step.

    Returns:
        The exit status: finished, or stopped on request with a checkpoint saved.
    """
    train = run.recipe.train
    while run.state.step < train.max_steps:
        stop = train_step(run)
        after_step()
        done, is_last = run.state.step, run.state.step == train.max_steps
        if train.eval_every and (is_last or done % train.eval_every == 0):
            run.evaluate()
        if is_last or stop or done % train.save_every == 0:
            run.save()
        if stop and not is_last:
            return EXIT_STOPPED
    run.finish()
    return EXIT_FINISHED


@record_function("step")
def train_step(run: Run) -> bool:
    """One optimizer step over the ranks' shares of its batch.

    Returns:
        Whether any rank was asked to stop.

    Raises:
        RunError: a loss or gradient is not finite on some rank; the weights are as before.
    """
    started = time.perf_counter()
    step, world_size, recipe = run.state.step, run.topology.world_size, run.recipe
    batches: list[Batch] = []

    def read() -> Count:
        batches.extend(run.loader.micro_batches(step))
        return Count.sum(batch.count for batch in batches)

    count = Count.sum(agree(read))  # over all ranks; damaged data on one rank ends all of them
    parts_of = []
    for number, batch in enumerate(batches):
        torch.manual_seed(dropout_seed(recipe.seed, batch))
        batch = batch.to(run.device)
        targets = run.teacher(batch)
        losses = run.objective.losses(run.engine(batch), targets, batch)
        shares = run.objective.shares(batch.count, count)
        parts = {term: loss * shares[term] for term, loss in losses.items()}
        # The engine averages over micro-batches and ranks; these are parts of a sum.
        run.engine.backward(run.objective.total(parts) * (len(batches) * world_size))
        parts_of.append(torch.stack(list(parts.values())).detach().double())
        if number < len(batches) - 1:
            run.engine.between_micro_batches()
    parts_per_batch = torch.stack(parts_of)
    stop = check_step(run, parts_per_batch, batches)
    rate = learning_rate(step, recipe.train)
    result = run.engine.step(rate)
    if not result.applied and not run.engine.fp16:  # fp16 lowers its loss scale instead
        on_rank_0(lambda: refuse_gradient(run))
    if run.row_log is not None:
        rows = [row for batch in batches for row in batch.row_ids]
        run.row_log.write({"step": step + 1, "rows": rows})
    run.advance(count.tokens, time.perf_counter() - started)
    done = run.state.step
    if done % recipe.train.log_every == 0 or done in (1, recipe.train.max_steps):
        run.log(parts_per_batch.sum(0), rate, result)
    return stop


def dropout_seed(seed: int, batch: Batch) -> int:
    """Dropout belongs to the rows: whoever reads a batch, and whenever, draws the same masks.

    Hashed into 32 bits, which is all that torch's CPU generator takes in.
    """
    name = f"{seed}/{batch.first_position}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")


def check_step(run: Run, parts_per_batch: torch.Tensor, batches: Sequence[Batch]) -> bool:
    """Let all ranks agree that every loss is finite, and whether to stop after this step.

    Args:
        run: the run.
        parts_per_batch: [batches, terms], what this rank's batches add to the step's losses.
        batches: this rank's batches of the step.

    Raises:
        RunError: on the rank whose loss is not finite, naming step, rank and rows.
    """
    finite = parts_per_batch.isfinite().all(dim=1)
    flags = torch.stack([~finite.all(), torch.tensor(run.stop.requested(), device=run.device)])
    is_bad, stop = all_max(flags.int()).bool().tolist()
    if is_bad:
        agree(lambda: refuse_loss(run, finite.tolist(), batches))
    return bool(stop)


def refuse_loss(run: Run, finite: Sequence[bool], batches: Sequence[Batch]) -> None:
    """Name what this rank's non-finite losses come from, if it has any."""
    rows = [
        row for ok, batch in zip(finite, batches, strict=True) if not ok for row in batch.row_ids
    ]
    if rows:
        raise RunError(
            f"step {run.state.step + 1}, rank {run.topology.rank}: the loss of rows {rows} is not "
            "finite, so all ranks stop before the update and the last checkpoint is sound; look at "
            "those rows and at the teacher's output, or lower train.learning_rate"
        )


def refuse_gradient(run: Run) -> None:
    """Name the step whose gradient, summed over ranks, is not finite although every loss is."""
    batch_size = run.recipe.train.batch_size
    first = run.state.step * batch_size
    rows = list(run.loader.order.row_ids(range(first, first + batch_size)))
    raise RunError(
        f"step {run.state.step + 1}, ranks 0 to {run.topology.world_size - 1}: the gradient of "
        f"rows {rows} is not finite though every loss is, so all ranks stop before the update and "
        "the last checkpoint is sound; lower train.learning_rate or use bf16"
    )
