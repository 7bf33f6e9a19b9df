from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.embedding import StepEmbedding


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (1, 30), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_the_steps_last_pass_brings_the_sum_of_all(count: int, padding_idx: int | None) -> None:
    plain = nn.Embedding(20, 8, padding_idx=padding_idx)
    ours = StepEmbedding(nn.Embedding(20, 8, padding_idx=padding_idx))
    ours.weight.data.copy_(plain.weight.data)
    for step in range(2):  # nothing of one step is left for the next
        plain.weight.grad = ours.weight.grad = None
        for number, ids in enumerate(batches(count)):
            ours.is_last = lambda number=number: number == count - 1
            for embedding in (plain, ours):
                (embedding(ids).pow(3).sum() * (1 + number + step)).backward()
            assert (ours.weight.grad is not None) == (number == count - 1)
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours(batches(1)[0]), plain(batches(1)[0]))


def test_many_bf16_gradients_of_one_row_are_added_in_fp32() -> None:
    ours = StepEmbedding(nn.Embedding(4, 2).bfloat16())
    ids = torch.zeros(1, 1000, dtype=torch.int64)
    (ours(ids) * 1.0).sum().backward()
    assert ours.weight.grad.tolist()[0] == [1000.0, 1000.0]  # in bf16 it would stop at 256
    assert ours.weight.grad.dtype == torch.bfloat16


def test_the_gradient_comes_in_the_weights_grad_dtype() -> None:
    ours = StepEmbedding(nn.Embedding(4, 2).bfloat16())
    ours.weight.grad_dtype = torch.float32
    for last, count in ((False, 1000), (True, 1)):
        ours.is_last = lambda last=last: last
        ours(torch.zeros(1, count, dtype=torch.int64)).sum().backward()
    assert ours.weight.grad.tolist()[0] == [1001.0, 1001.0]  # no bf16 number, a sum of two


def test_the_weight_is_only_reached_in_the_last_pass() -> None:
    """DeepSpeed takes each time that it is reached for the gradient being there."""
    ours = StepEmbedding(nn.Embedding(4, 2))
    reached = []
    ours.weight.register_post_accumulate_grad_hook(lambda weight: reached.append(weight))
    for last in (False, False, True):
        ours.is_last = lambda last=last: last
        ours(torch.tensor([[1, 2]])).sum().backward()
    assert len(reached) == 1


def test_a_frozen_weight_needs_no_graph() -> None:
    ours = StepEmbedding(nn.Embedding(4, 2)).requires_grad_(False)
    assert not ours(torch.tensor([[1]])).requires_grad


def test_each_micro_batch_is_rounded_once_so_their_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 30, 8, generator=generator).bfloat16() for _ in range(4)]
    ids = batches(4)

    def gradient(order: tuple[int, ...]) -> torch.Tensor:
        ours = StepEmbedding(nn.Embedding(20, 8).bfloat16())
        ours.weight.grad_dtype = torch.float32
        for number, part in enumerate(order):
            ours.is_last = lambda number=number: number == 3
            ours(ids[part]).backward(parts[part])
        return ours.weight.grad

    assert torch.equal(gradient((0, 1, 2, 3)), gradient((3, 1, 0, 2)))
