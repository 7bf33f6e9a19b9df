from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.config import Objective, Recipe
from pipeline.objectives import QKV, active_relations, minilmv2, total
from pipeline.relation_kl import relation_kl

CU_SEQLENS = torch.tensor([0, 4, 5, 11], dtype=torch.int32)


@pytest.fixture
def student() -> QKV:
    generator = torch.Generator().manual_seed(1)
    return QKV(*(torch.randn(11, 8, generator=generator, requires_grad=True) for _ in range(3)))


@pytest.fixture
def teacher() -> QKV:
    generator = torch.Generator().manual_seed(2)
    return QKV(*(torch.randn(11, 12, generator=generator) for _ in range(3)))


@pytest.fixture
def objective(make_recipe: Callable[..., Recipe]) -> Callable[..., Objective]:
    return lambda **relations: make_recipe(objective={"relations": relations}).objective


def test_each_relation_is_of_its_own_vectors(student: QKV, teacher: QKV, objective) -> None:
    losses = minilmv2(student, teacher, CU_SEQLENS, objective(qq=1.0, kk=1.0, vv=1.0))
    for name, own, target in zip("qkv", student, teacher, strict=True):
        assert losses[name * 2] == relation_kl(own, target, CU_SEQLENS, 4)
    assert len({loss.item() for loss in losses.values()}) == 3


def test_a_relation_of_weight_0_is_not_computed_and_gets_no_gradient(
    student: QKV, teacher: QKV, objective
) -> None:
    chosen = objective(qq=0.0, kk=2.0)
    losses = minilmv2(student, teacher, CU_SEQLENS, chosen)
    assert list(losses) == ["kk"]
    total(losses, chosen).backward()
    assert student.k.grad is not None
    assert student.q.grad is None
    assert student.v.grad is None


def test_the_order_of_relations_does_not_depend_on_the_recipes(objective) -> None:
    assert active_relations(objective(vv=1.0, qq=1.0, kk=0.5)) == ["kk", "qq", "vv"]
    assert active_relations(objective(vv=1.0, qq=0.0)) == ["vv"]


def test_the_total_is_the_weighted_sum(objective) -> None:
    losses = {name: torch.tensor(loss) for name, loss in (("kk", 2.0), ("qq", 3.0), ("vv", 5.0))}
    assert total(losses, objective(qq=0.5, kk=10.0, vv=1.0)) == 20.0 + 1.5 + 5.0


def test_losses_are_unweighted(student: QKV, teacher: QKV, objective) -> None:
    once = minilmv2(student, teacher, CU_SEQLENS, objective(qq=1.0))
    thrice = minilmv2(student, teacher, CU_SEQLENS, objective(qq=3.0))
    assert once == thrice


def test_the_recipe_decides_heads_and_implementation(
    student: QKV, teacher: QKV, make_recipe: Callable[..., Recipe], monkeypatch
) -> None:
    calls = []

    def spy(s, t, cu, heads, *, implementation):
        calls.append((heads, implementation))
        return torch.zeros(())

    monkeypatch.setattr("pipeline.objectives.relation_kl", spy)
    chosen = {"num_relation_heads": 2, "relation_kl": "reference", "relations": {"vv": 1.0}}
    minilmv2(student, teacher, CU_SEQLENS, make_recipe(objective=chosen).objective)
    assert calls == [(2, "reference")]
