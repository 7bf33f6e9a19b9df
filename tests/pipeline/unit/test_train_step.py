"""One optimizer step with a stand-in engine: what reaches the gradient, and what stops a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.command import RunError
from pipeline import loop
from pipeline.config import Recipe
from pipeline.engine import StepResult
from pipeline.loader import Batch, Count
from pipeline.loop import train_step
from pipeline.objectives import QKV
from pipeline.topology import Topology

LENGTHS = [(5, 2), (1,), (9, 1, 3), (4,)]  # of the segments of each micro-batch


def make_batches(first_position: int = 0) -> list[Batch]:
    batches = []
    for number, lengths in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(number)
        batches.append(
            Batch(
                input_ids=torch.randint(0, 20, (1, sum(lengths)), generator=generator),
                positions=torch.cat([torch.arange(length) for length in lengths])[None],
                cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
                max_seqlen=max(lengths),
                first_position=first_position + 2 * number,
                row_ids=(10 * number, 10 * number + 1),
            )
        )
    return batches


class StandInEngine:
    """Averages gradients over micro-batches, as DeepSpeed does; updates nothing."""

    def __init__(self, dropout: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(20, 3, 8, generator=generator, requires_grad=True)
        self.dropout = dropout
        self.fp16, self.applied, self.broken_row = False, True, -1
        self.events: list[str] = []
        self.rates: list[float] = []
        self.noise: list[torch.Tensor] = []

    def __call__(self, batch: Batch) -> QKV:
        self.events.append("forward")
        self.noise.append(torch.rand(3))
        vectors = self.table[batch.input_ids[0]]
        if self.broken_row in batch.row_ids:
            vectors = vectors * math.nan
        return QKV(*vectors.unbind(1))

    def backward(self, loss: torch.Tensor) -> None:
        self.events.append("backward")
        (loss / len(LENGTHS)).backward()

    def between_micro_batches(self) -> None:
        self.events.append("between")

    def skip_step(self) -> StepResult:
        self.events.append("skip")
        return StepResult(grad_norm=math.inf, applied=False)

    def step(self, learning_rate: float) -> StepResult:
        self.events.append("step")
        self.rates.append(learning_rate)
        return StepResult(grad_norm=1.0, applied=self.applied)


def teacher(batch: Batch) -> QKV:
    generator = torch.Generator().manual_seed(int(batch.input_ids.sum()))
    return QKV(*(torch.randn(batch.num_tokens, 12, generator=generator) for _ in range(3)))


@pytest.fixture
def make_run(
    make_recipe: Callable[..., Recipe], make_objective: Callable[..., Any], one_rank: Topology
) -> Callable[..., Any]:
    def make(*, step: int = 0, seed: int = 1, **train: Any) -> Any:
        recipe = make_recipe(seed=seed, train={"warmup_steps": 0, **train})
        run = SimpleNamespace(
            recipe=recipe,
            topology=one_rank,
            device=torch.device("cpu"),
            stop=SimpleNamespace(requested=lambda: False),
            loader=SimpleNamespace(
                micro_batches=lambda step: make_batches(8 * step),
                order=SimpleNamespace(row_ids=lambda positions: [100 + p for p in positions]),
            ),
            objective=make_objective(recipe),
            teacher=teacher,
            engine=StandInEngine(),
            checkpoints=SimpleNamespace(is_busy=False, settle=lambda: None),
            row_log=None,
            state=SimpleNamespace(step=step),
            advanced=[],
            lost=[],
            logged=[],
        )

        def advance(num_tokens: int, loss: float, seconds: float, own_seconds: float) -> None:
            run.state.step += 1
            run.advanced.append(num_tokens)
            run.lost.append(loss)

        run.advance, run.loss, run.leaves_out = advance, sum, lambda loss: False
        run.log = lambda means, rate, result: run.logged.append((means, rate))
        return run

    return make


def whole_batch_losses(run: Any) -> dict[str, torch.Tensor]:
    """The relations' means over all tokens of the step, as one batch."""
    batches = make_batches()
    vectors = [run.engine.table[batch.input_ids[0]].unbind(1) for batch in batches]
    student = QKV(*(torch.cat(parts) for parts in zip(*vectors, strict=True)))
    target = QKV(*(torch.cat(p) for p in zip(*[teacher(b) for b in batches], strict=True)))
    bounds = torch.tensor([0, *[n for lengths in LENGTHS for n in lengths]]).cumsum(0)
    whole = dataclasses.replace(batches[0], cu_seqlens=bounds)
    losses: dict[str, torch.Tensor] = run.objective.losses(student, target, whole)
    return losses


def test_the_gradient_is_of_the_mean_over_the_steps_tokens(make_run) -> None:
    """However unequal the micro-batches are."""
    run = make_run()
    (expected,) = torch.autograd.grad(
        run.objective.total(whole_batch_losses(run)), run.engine.table
    )
    assert train_step([run]) is False
    assert run.engine.table.grad is not None
    torch.testing.assert_close(run.engine.table.grad, expected, rtol=1e-5, atol=1e-7)
    assert run.advanced == [25]


def test_a_rank_weighs_its_tokens_among_all_ranks(make_run, monkeypatch) -> None:
    """The other of two ranks has 15 tokens; DeepSpeed then averages the two gradients."""
    run = make_run()
    (mean_of_mine,) = torch.autograd.grad(
        run.objective.total(whole_batch_losses(run)), run.engine.table
    )
    run.topology = dataclasses.replace(run.topology, world_size=2)
    monkeypatch.setattr("pipeline.loop.agree", lambda work: [work(), Count(15, 0)])
    train_step([run])
    assert run.engine.table.grad is not None
    torch.testing.assert_close(
        run.engine.table.grad / 2, mean_of_mine * 25 / 40, rtol=1e-5, atol=1e-7
    )
    assert run.advanced == [40]


def test_what_is_logged_adds_up_to_the_losses(make_run) -> None:
    run = make_run()
    train_step([run])
    ((means, rate),) = run.logged
    expected = [float(loss.detach()) for loss in whole_batch_losses(run).values()]
    assert means == pytest.approx(expected, rel=1e-5)
    assert run.lost == [sum(means)]
    assert run.engine.rates == [rate] == [run.recipe.train.learning_rate]


def test_the_order_of_events(make_run) -> None:
    run = make_run()
    train_step([run])
    inner = ["forward", "backward", "between"]
    assert run.engine.events == [*inner * 3, "forward", "backward", "step"]


@pytest.mark.parametrize(
    ("step", "is_logged"), [(0, True), (1, False), (2, True), (4, False), (9, True)]
)
def test_the_first_the_last_and_every_nth_step_are_logged(
    step: int, is_logged: bool, make_run
) -> None:
    run = make_run(step=step, log_every=3)
    train_step([run])
    assert bool(run.logged) is is_logged


@pytest.fixture
def noise(make_run) -> Callable[..., list[list[float]]]:
    """What each micro-batch of a step draws from torch's generator."""

    def draw(step: int, seed: int = 1, drawn_before: int = 0) -> list[list[float]]:
        run = make_run(step=step, seed=seed)
        torch.rand(drawn_before)
        train_step([run])
        return [drawn.tolist() for drawn in run.engine.noise]

    return draw


def test_dropout_does_not_depend_on_what_was_drawn_before(noise) -> None:
    assert noise(3) == noise(3, drawn_before=5)


def test_dropout_differs_from_rows_to_rows(noise) -> None:
    drawn = [tuple(values) for step in range(3) for values in noise(step)]
    assert len(set(drawn)) == len(drawn)


def test_dropout_differs_from_seed_to_seed(noise) -> None:
    drawn = [tuple(values) for seed in range(3) for values in noise(5, seed)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("seed", [0, 20260101, 2**31, 2**53])
def test_any_seed_that_a_recipe_may_have_works(seed: int, make_run) -> None:
    run = make_run(seed=seed)
    train_step([run])
    assert run.advanced == [25]


def test_a_request_to_stop_is_answered_after_the_step(make_run) -> None:
    run = make_run()
    run.stop.requested = lambda: True
    assert train_step([run]) is True
    assert run.engine.events[-1] == "step"
    assert run.advanced == [25]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_rows(make_run) -> None:
    run = make_run(step=4)
    run.engine.broken_row = 21
    with pytest.raises(RunError) as caught:
        train_step([run])
    message = str(caught.value)
    assert "step 5, rank 0" in message
    assert "[20, 21]" in message
    assert "learning_rate" in message
    assert "step" not in run.engine.events
    assert run.advanced == []


def test_a_gradient_that_is_not_finite_stops_and_names_the_steps_rows(make_run) -> None:
    run = make_run(step=4)
    run.engine.applied = False
    with pytest.raises(RunError) as caught:
        train_step([run])
    message = str(caught.value)
    assert "step 5, ranks 0 to 0" in message
    assert str([100 + position for position in range(32, 40)]) in message
    assert run.advanced == []


def test_a_step_that_is_left_out_counts_and_updates_nothing(make_run) -> None:
    run = make_run()
    run.leaves_out = lambda loss: loss == run.loss([loss])
    assert train_step([run]) is False
    assert "step" not in run.engine.events
    assert run.engine.events[-1] == "skip"
    assert run.advanced == [25]


def test_fp16_skips_a_step_whose_scale_was_too_large(make_run) -> None:
    run = make_run()
    run.engine.applied, run.engine.fp16 = False, True
    train_step([run])
    assert run.advanced == [25]


def test_the_rows_are_logged_where_it_is_asked(make_run) -> None:
    run = make_run(step=4)
    written: list[dict[str, Any]] = []
    run.row_log = SimpleNamespace(write=written.append)
    train_step([run])
    assert written == [{"step": 5, "rows": [0, 1, 10, 11, 20, 21, 30, 31]}]


# The loop


def test_a_checkpoint_that_was_begun_counts_although_the_run_fails_after(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, waited = make_run(save_every=1), []
    run.save = lambda: waited.append("begun")
    run.checkpoints.wait = lambda: waited.append("waited")

    def step_once(runs: list[Any]) -> bool:
        if waited:
            raise RunError("the loss is not finite")
        run.state.step += 1
        return False

    monkeypatch.setattr(loop, "train_step", step_once)
    with pytest.raises(RunError, match="not finite"):
        loop.train([run], lambda: None)
    assert waited == ["begun", "waited"]


def test_a_save_is_settled_once_no_rank_is_at_it(make_run) -> None:
    run, settled = make_run(), []
    run.checkpoints = SimpleNamespace(is_busy=True, settle=lambda: settled.append(run.state.step))
    train_step([run])
    run.checkpoints.is_busy = False
    train_step([run])
    assert settled == [1]
