from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline import heldout
from pipeline.config import Recipe
from pipeline.heldout import heldout_losses
from pipeline.loader import Batch
from pipeline.objectives import QKV, DistillationObjective
from pipeline.topology import Topology


def make_batch(seed: int, lengths: tuple[int, ...]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        input_ids=torch.randint(5, 50, (1, sum(lengths)), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        first_position=0,
        row_ids=(seed,),
    )


class Model:
    """A table from ids to vectors, in place of an engine or a teacher."""

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tables = [torch.randn(50, width, generator=generator) for _ in range(3)]
        self.modes: list[bool] = []
        self.forwards: list[int] = []

    def train(self, mode: bool) -> None:
        self.modes.append(mode)

    def __call__(self, batch: Batch) -> QKV:
        self.forwards.append(batch.row_ids[0])
        return QKV(*(table[batch.input_ids[0]] for table in self.tables))


BATCHES = {
    "de": [make_batch(1, (4, 3)), make_batch(2, (9,)), make_batch(3, (2,))],
    "sw": [make_batch(4, (5, 1))],
}


@pytest.fixture
def objective(
    make_recipe: Callable[..., Recipe], make_objective: Callable[..., DistillationObjective]
) -> DistillationObjective:
    relations = {"qq": 1.0, "kk": 0.0, "vv": 2.0}
    return make_objective(make_recipe(objective={"relations": relations}))


@pytest.fixture
def expected(objective: DistillationObjective) -> dict[str, float]:
    """Every language's tokens in one batch, as the objective sees it."""
    means = {}
    for language, batches in BATCHES.items():
        seen = {}
        for name, model in (("student", Model(8, 1)), ("teacher", Model(12, 2))):
            parts = [model(batch) for batch in batches]
            seen[name] = QKV(*(torch.cat(vectors) for vectors in zip(*parts, strict=True)))
        bounds = [0]
        for batch in batches:
            start = bounds[-1]
            bounds += [start + bound for bound in batch.cu_seqlens.tolist()[1:]]
        whole = dataclasses.replace(batches[0], cu_seqlens=torch.tensor(bounds))
        losses = objective.losses(seen["student"], seen["teacher"], whole)
        means[language] = float(objective.total(losses))
    return {
        "heldout_loss": sum(means.values()) / len(means),
        **{f"heldout_loss_{language}": mean for language, mean in means.items()},
    }


def evaluate(
    rank: int, world_size: int, objective: DistillationObjective
) -> tuple[dict[str, float], Model]:
    topology = Topology(
        rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size
    )
    engine = Model(8, 1)
    losses: dict[str, float] = heldout_losses(
        engine, Model(12, 2), BATCHES, objective, topology, torch.device("cpu")
    )
    return losses, engine


def test_each_language_is_a_mean_over_its_tokens(
    objective: DistillationObjective, expected: dict[str, float]
) -> None:
    losses, engine = evaluate(0, 1, objective)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert engine.forwards == [1, 2, 3, 4]
    assert engine.modes == [False, True]  # no dropout while it lasts


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches_and_count_each_once(
    world_size: int,
    objective: DistillationObjective,
    expected: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[torch.Tensor] = []
    sums: list[Any] = [lambda share: shares.append(share.clone()) or share]
    monkeypatch.setattr(heldout, "all_sum", lambda share: sums[0](share))
    num_forwards = {
        len(evaluate(rank, world_size, objective)[1].forwards) for rank in range(world_size)
    }
    assert len(num_forwards) == 1  # ZeRO-3 gathers weights in each
    whole = torch.stack(shares).sum(0)
    sums[0] = lambda share: whole
    for rank in range(world_size):
        assert evaluate(rank, world_size, objective)[0] == pytest.approx(expected, rel=1e-5)
