"""The training loop."""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from data_prep.command import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    ElsewhereError,
    RunError,
)
from pipeline.collectives import agree, all_sum, on_rank_0
from pipeline.corruption import check_corruption
from pipeline.loader import Batch, Count
from pipeline.progress import PROGRESS
from pipeline.schedule import learning_rate

if TYPE_CHECKING:
    from pipeline.run import Run


def train(runs: Sequence[Run], after_step: Callable[[], object]) -> int:
    """The loop: step, log, evaluate, save. Saving comes last, so a checkpoint covers the rest.

    Args:
        runs: students of one teacher pass; their states say where each begins.
        after_step: called after every optimizer step.

    Returns:
        The exit status: finished, or stopped on request with a checkpoint saved.

    Raises:
        RunError: as `train_step` does, after a checkpoint that was begun is written; or
            checkpoints cannot be written.
    """
    try:
        return _train(runs, after_step)
    except (RunError, ElsewhereError):  # which all ranks know of: none is missing in a collective
        for run in runs:
            run.checkpoints.wait()
        raise


def _train(runs: Sequence[Run], after_step: Callable[[], object]) -> int:
    train, check_every = runs[0].recipe.train, runs[0].recipe.watch.check_corruption_every
    while (done := min(run.state.step for run in runs)) < train.max_steps:
        behind = [run for run in runs if run.state.step == done]  # a kill can part them
        stop = train_step(behind)
        after_step()
        done, is_last = done + 1, done + 1 == train.max_steps
        if check_every and done % check_every == 0:  # before anything is kept of it
            PROGRESS.begin("comparison of ranks")
            check_corruption(behind)
        for run in behind:
            if train.eval_every and (is_last or done % train.eval_every == 0):
                PROGRESS.begin("evaluation")
                run.evaluate()
            if is_last or stop or done % train.save_every == 0:
                PROGRESS.begin("saving")
                run.save()
        if stop and not is_last:
            for run in runs:
                run.checkpoints.finish()
            return EXIT_STOPPED
    PROGRESS.begin("finishing")
    for run in runs:
        run.finish()
    return EXIT_FINISHED


@record_function("step")
def train_step(runs: Sequence[Run]) -> bool:
    """One optimizer step of every student over the ranks' shares of its batch.

    Args:
        runs: at the same step, of one teacher and one loader.

    Returns:
        Whether any rank was asked to stop.

    Raises:
        RunError: a loss or gradient is not finite on some rank; the weights are as before.
    """
    started = time.perf_counter()
    step, loader = runs[0].state.step, runs[0].loader
    PROGRESS.begin("reading", step=step + 1)
    batches: list[Batch] = []

    def read() -> Count:
        batches.extend(loader.micro_batches(step))
        return Count.sum(batch.count for batch in batches)

    count = Count.sum(agree(read))  # over all ranks; damaged data on one rank ends all of them
    parts: list[list[torch.Tensor]] = [[] for _ in runs]
    for number, batch in enumerate(batches):
        size = f"{batch.num_tokens} tokens, {len(batch.row_ids)} rows"
        PROGRESS.begin(f"micro-batch {number + 1} of {len(batches)} ({size})")
        batch = batch.to(runs[0].device)
        for run, parts_of_run in zip(runs, parts, strict=True):
            parts_of_run.append(imitate(run, batch, count, len(batches)))
            if number < len(batches) - 1:
                run.engine.between_micro_batches()
    parts_per_batch = [torch.stack(parts_of_run) for parts_of_run in parts]
    PROGRESS.begin("agreement")
    stop, is_saving, losses = check_step(runs, parts_per_batch, batches)
    own_seconds = PROGRESS.own_seconds()
    for run, is_run_saving in zip(runs, is_saving, strict=True):
        if not is_run_saving:
            run.checkpoints.settle()
    for run, means in zip(runs, losses, strict=True):
        train = run.recipe.train
        PROGRESS.begin("update")
        rate = learning_rate(step, train)
        if run.leaves_out(loss := run.loss(means)):
            result = run.engine.skip_step()
        else:
            result = run.engine.step(rate)
            if not result.applied and not run.engine.fp16:  # fp16 lowers its loss scale instead
                on_rank_0(functools.partial(refuse_gradient, run))
        if run.row_log is not None:
            rows = [row for batch in batches for row in batch.row_ids]
            run.row_log.write({"step": step + 1, "rows": rows})
        run.advance(count.tokens, loss, time.perf_counter() - started, own_seconds)
        done = run.state.step
        if done % train.log_every == 0 or done in (1, train.max_steps):
            run.log(means, rate, result)
    return stop


def imitate(run: Run, batch: Batch, count: Count, num_batches: int) -> torch.Tensor:
    """A student's forward and backward pass over a micro-batch.

    Args:
        run: the student's.
        batch: on the run's device.
        count: of the step, over all ranks.
        num_batches: micro-batches of a rank's step.

    Returns:
        [terms] fp64: what the batch adds to each of the step's losses.
    """
    targets = run.teacher(batch)
    torch.manual_seed(dropout_seed(run.recipe.seed, batch))
    losses = run.objective.losses(run.engine(batch), targets, batch)
    shares = run.objective.shares(batch.count, count)
    parts = {term: loss * shares[term] for term, loss in losses.items()}
    # The engine averages over micro-batches and ranks; these are parts of a sum.
    run.engine.backward(run.objective.total(parts) * (num_batches * run.topology.world_size))
    return torch.stack(list(parts.values())).detach().double()


def dropout_seed(seed: int, batch: Batch) -> int:
    """Dropout belongs to the rows: whoever reads a batch, and whenever, draws the same masks.

    Hashed into 32 bits, which is all that torch's CPU generator takes in.
    """
    name = f"{seed}/{batch.first_position}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")


def check_step(
    runs: Sequence[Run], parts_per_batch: Sequence[torch.Tensor], batches: Sequence[Batch]
) -> tuple[bool, list[bool], list[list[float]]]:
    """Let all ranks agree that every loss is finite, what it is, and what to do after this step.

    Args:
        runs: the students'.
        parts_per_batch: of each student [batches, terms] fp64, what this rank's batches add to the
            step's losses.
        batches: this rank's batches of the step.

    Returns:
        Whether any rank was asked to stop; of each student whether any rank is still writing its
        checkpoint; and of each the terms of the step's loss.

    Raises:
        RunError: on the rank whose loss is not finite, naming step, rank and rows.
    """
    first = runs[0]
    finite = [parts.isfinite().all(dim=1) for parts in parts_per_batch]
    sums = [parts.sum(0) for parts in parts_per_batch]
    is_wanted = [first.stop.requested(), *(run.checkpoints.is_busy for run in runs)]
    is_bad = ~torch.cat(finite).all()
    flags = torch.stack([is_bad, *torch.tensor(is_wanted, device=first.device).unbind()])
    num_bad, num_asked, *rest = all_sum(torch.cat([flags.double(), *sums])).tolist()
    if num_bad:
        agree(lambda: refuse_loss(runs, [of_run.tolist() for of_run in finite], batches))
    num_saving, terms = rest[: len(runs)], iter(rest[len(runs) :])
    losses = [list(itertools.islice(terms, len(parts))) for parts in sums]
    return num_asked > 0, [number > 0 for number in num_saving], losses


def refuse_loss(
    runs: Sequence[Run], finite: Sequence[Sequence[bool]], batches: Sequence[Batch]
) -> None:
    """Name what this rank's non-finite losses come from, if it has any."""
    for run, finite_of_run in zip(runs, finite, strict=True):
        pairs = zip(finite_of_run, batches, strict=True)
        rows = [row for ok, batch in pairs if not ok for row in batch.row_ids]
        if rows:
            raise RunError(
                f"{run.recipe.output_dir}, step {run.state.step + 1}, rank {run.topology.rank}: "
                f"the loss of rows {rows} is not finite, so all ranks stop before the update and "
                "the last checkpoint is sound; look at those rows and at the teacher's output, or "
                "lower train.learning_rate"
            )


def refuse_gradient(run: Run) -> None:
    """Name the step whose gradient, summed over ranks, is not finite although every loss is."""
    batch_size = run.recipe.train.batch_size
    first = run.state.step * batch_size
    rows = list(run.loader.order.row_ids(range(first, first + batch_size)))
    raise RunError(
        f"{run.recipe.output_dir}, step {run.state.step + 1}, ranks 0 to "
        f"{run.topology.world_size - 1}: the gradient of rows {rows} is not finite though every "
        "loss is, so all ranks stop before the update and the last checkpoint is sound; lower "
        "train.learning_rate or use bf16"
    )
