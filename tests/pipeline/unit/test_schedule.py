from __future__ import annotations

import dataclasses
import itertools

import pytest

from pipeline.config import Train
from pipeline.schedule import learning_rate

TRAIN = Train(max_steps=10, batch_size=1, micro_batch_size=1, learning_rate=6.0, warmup_steps=4)


def rates(**changes: int) -> list[float]:
    train = dataclasses.replace(TRAIN, **changes)
    return [learning_rate(step, train) for step in range(train.max_steps)]


def test_warm_up_then_decay() -> None:
    assert rates() == pytest.approx([1.5, 3.0, 4.5, 6.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    assert rates(max_steps=3, warmup_steps=0) == pytest.approx([6.0, 4.0, 2.0])


def test_all_warm_up() -> None:
    assert rates(max_steps=3, warmup_steps=3) == pytest.approx([2.0, 4.0, 6.0])
    assert rates(max_steps=2, warmup_steps=4) == pytest.approx([1.5, 3.0])


@pytest.mark.parametrize("max_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 50, 100, 1000])
def test_every_step_moves_and_none_above_the_peak(max_steps: int, warmup_steps: int) -> None:
    found = rates(max_steps=max_steps, warmup_steps=warmup_steps)
    assert all(0 < rate <= 6.0 for rate in found)
    rises = [later > sooner for sooner, later in itertools.pairwise(found)]
    assert rises == sorted(rises, reverse=True)  # up first, then never again
