from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.attention import packed_attention

HEADS, WIDTH = 3, 8
BOUNDS = (0, 4, 5, 12, 14)


def random_qkv(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, BOUNDS[-1], WIDTH)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds=BOUNDS, **options
) -> torch.Tensor:
    out, weights = packed_attention(torch.nn.Identity(), q, k, v, None, bounds=bounds, **options)
    assert weights is None
    return out


@pytest.mark.parametrize("scaling", [None, 0.2])
def test_each_segment_is_attended_to_as_if_it_were_alone(scaling: float | None) -> None:
    q, k, v = random_qkv()
    out = attend(q, k, v, scaling=scaling)
    assert out.shape == (1, BOUNDS[-1], HEADS, WIDTH)
    for head in range(HEADS):
        for start, stop in itertools.pairwise(BOUNDS):
            for query in range(start, stop):
                scores = k[0, head, start:stop] @ q[0, head, query]
                weights = torch.softmax(scores * (scaling or WIDTH**-0.5), dim=0)
                expected = weights @ v[0, head, start:stop]
                torch.testing.assert_close(out[0, query, head], expected, rtol=1e-5, atol=1e-6)


def test_a_segment_of_one_token_gives_its_value() -> None:
    q, k, v = random_qkv()
    torch.testing.assert_close(attend(q, k, v)[0, 4], v[0, :, 4])


@pytest.mark.parametrize("changed", range(len(BOUNDS) - 1))
def test_nothing_leaks_between_segments(changed: int) -> None:
    start, stop = BOUNDS[changed], BOUNDS[changed + 1]
    inputs = random_qkv()
    before = attend(*inputs)
    others = random_qkv(seed=1)
    for tensor, other in zip(inputs, others, strict=True):
        tensor[:, :, start:stop] = other[:, :, start:stop]
    after = attend(*inputs)
    outside = [t for t in range(BOUNDS[-1]) if not start <= t < stop]
    assert torch.equal(before[:, outside], after[:, outside])  # to the bit
    assert not torch.equal(before[:, start:stop], after[:, start:stop])


def test_gradients_do_not_leak_either() -> None:
    inputs = [tensor.requires_grad_() for tensor in random_qkv()]
    attend(*inputs)[:, 5:12].sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad[:, :, 5:12].abs().sum() > 0
        assert tensor.grad[:, :, :5].abs().sum() == 0
        assert tensor.grad[:, :, 12:].abs().sum() == 0


def test_dropout_is_of_the_weights_and_off_by_default() -> None:
    q, k, v = random_qkv()
    assert torch.equal(attend(q, k, v), attend(q, k, v))
    torch.manual_seed(0)
    dropped = attend(q, k, v, dropout=0.5)
    assert not torch.equal(dropped, attend(q, k, v))
    kept = dropped[0, 4].abs().sum(-1) > 0  # one token, one weight a head: all or nothing
    torch.testing.assert_close(dropped[0, 4][kept], 2 * v[0, :, 4][kept])
    torch.manual_seed(0)
    assert torch.equal(dropped, attend(q, k, v, dropout=0.5))


def test_it_is_called_as_transformers_calls_attention() -> None:
    q, k, v = random_qkv()
    assert torch.equal(attend(q, k, v), attend(q, k, v, is_causal=False, position_bias=None))
