from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from pipeline import attention
from pipeline.attention import (
    attention_by_segment,
    attention_in_c,
    attention_in_window,
    jagged_attention,
    packed_attention,
)

HEADS, WIDTH = 3, 16
LENGTHS = (4, 1, 7, 2)
BOUNDS = (0, *itertools.accumulate(LENGTHS))
Attend = Callable[..., torch.Tensor]

needs_c = pytest.mark.skipif(
    attention._library() is None, reason="no C compiler, or a CPU without AVX512-BF16"
)
# Relative to the largest value of the oracle, on the same rounded inputs. In bf16 a gradient goes
# through three roundings: of the weights, of the output in their derivative, and of the result.
BF16 = 3 * 2**-8
WAYS = [
    pytest.param(attention_by_segment, torch.float32, 2e-6, id="by_segment-fp32"),
    pytest.param(attention_by_segment, torch.bfloat16, BF16, id="by_segment-bf16"),
    pytest.param(jagged_attention, torch.float32, 2e-6, id="jagged-fp32"),
    pytest.param(attention_in_c, torch.bfloat16, BF16, id="c-bf16", marks=needs_c),
    # As wide as any segment here: full attention.
    pytest.param(
        functools.partial(attention_in_window, window=100), torch.float32, 2e-6, id="window-fp32"
    ),
    pytest.param(
        functools.partial(attention_in_window, window=100), torch.bfloat16, BF16, id="window-bf16"
    ),
]
each_way = pytest.mark.parametrize(("attend", "dtype", "tolerance"), WAYS)


def vectors(
    dtype: torch.dtype, seed: int = 0, tokens: int = BOUNDS[-1], width: int = WIDTH
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, HEADS, width, generator=generator).to(dtype) for _ in range(3)]


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Sequence[int],
    scale: float,
    window: int = 10**9,
) -> torch.Tensor:
    """Softmax attention in float64, one query at a time."""
    rows = []
    for start, stop in itertools.pairwise(bounds):
        for query in range(start, stop):
            seen = slice(max(start, query - window + 1), min(stop, query + window))
            scores = torch.einsum("hd,jhd->hj", q[query], k[seen]) * scale
            rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[seen]))
    return torch.stack(rows)


def run(
    attend: Attend,
    inputs: Sequence[torch.Tensor],
    bounds: Sequence[int] = BOUNDS,
    scale: float = 0.25,
    dropout: float = 0.0,
) -> torch.Tensor:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    return attend(*inputs, cu_seqlens, longest, scale, dropout)


@each_way
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, (1,), (16, 32), (33, 1, 31), (100, 17), (64, 0, 5), (2,) * 9],
    ids=str,
)
def test_value_and_gradient_are_those_of_segments_alone(
    attend: Attend,
    dtype: torch.dtype,
    tolerance: float,
    width: int,
    lengths: tuple[int, ...],
) -> None:
    bounds = (0, *itertools.accumulate(lengths))
    rounded = vectors(dtype, tokens=bounds[-1], width=width)
    leaves = [x.requires_grad_() for x in rounded]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    out = run(attend, leaves, bounds, scale=width**-0.5)
    expected = oracle(*exact, bounds, width**-0.5)
    upstream = vectors(dtype, seed=1, tokens=bounds[-1], width=width)[0]
    out.backward(upstream)
    expected.backward(upstream.double())
    assert out.dtype == dtype
    for got, true in [
        (out.detach(), expected.detach()),
        *((x.grad, y.grad) for x, y in zip(leaves, exact, strict=True)),
    ]:
        error = float((got.double() - true).abs().max())
        assert error <= tolerance * max(1.0, float(true.abs().max()))


@each_way
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_nothing_leaks_between_segments(
    attend: Attend, dtype: torch.dtype, tolerance: float, changed: int
) -> None:
    start, stop = BOUNDS[changed], BOUNDS[changed + 1]
    inputs = vectors(dtype)
    before = run(attend, inputs)
    for tensor, other in zip(inputs, vectors(dtype, seed=1), strict=True):
        tensor[start:stop] = other[start:stop]
    after = run(attend, inputs)
    outside = [t for t in range(BOUNDS[-1]) if not start <= t < stop]
    assert torch.equal(before[outside], after[outside])  # to the bit
    assert not torch.equal(before[start:stop], after[start:stop])


@each_way
def test_gradients_do_not_leak_either(attend: Attend, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [tensor.requires_grad_() for tensor in vectors(dtype)]
    run(attend, inputs)[5:12].sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad[5:12].abs().sum() > 0
        assert tensor.grad[:5].abs().sum() == 0
        assert tensor.grad[12:].abs().sum() == 0


@each_way
def test_dropout_is_of_the_weights_and_follows_the_seed(
    attend: Attend, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = vectors(dtype)
    torch.manual_seed(0)
    dropped = run(attend, inputs, dropout=0.5)
    assert not torch.equal(dropped, run(attend, inputs))
    kept = dropped[4].abs().sum(-1) > 0  # one token, one weight a head: all or nothing
    torch.testing.assert_close(dropped[4][kept], 2 * inputs[2][4][kept])
    torch.manual_seed(0)
    assert torch.equal(dropped, run(attend, inputs, dropout=0.5))


@needs_c
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_kernels_dropout_drops_the_share_it_should_everywhere_alike(p: float) -> None:
    """Values that are unit vectors make the weights visible."""
    tokens = width = 128
    zeros = torch.zeros(tokens, 2, width, dtype=torch.bfloat16)
    values = torch.eye(tokens, dtype=torch.bfloat16)[:, None].expand(-1, 2, -1).contiguous()
    torch.manual_seed(0)
    weights = run(attention_in_c, [zeros, zeros, values], (0, tokens), dropout=p).float() * tokens
    kept = weights > 0
    assert torch.allclose(weights[kept], torch.tensor(1 / (1 - p)), rtol=2**-7)
    spread = (p * (1 - p) / tokens) ** 0.5
    assert abs(float((~kept).float().mean()) - p) < 5 * spread / (2 * tokens) ** 0.5
    for of_line in (~kept).float().mean(0), (~kept).float().mean(2):
        assert float((of_line - p).abs().max()) < 5 * spread
    assert not torch.equal(kept[:, 0], kept[:, 1])  # heads differ


@needs_c
def test_the_gradient_is_that_of_the_weights_that_were_dropped() -> None:
    """The backward pass draws the mask anew; a plain computation with the seen mask agrees."""
    tokens = width = 64
    q, k, _ = vectors(torch.bfloat16, tokens=tokens, width=width)
    eye = torch.eye(tokens, dtype=torch.bfloat16)[:, None].expand(-1, HEADS, -1).contiguous()
    torch.manual_seed(3)
    mask = run(attention_in_c, [q, k, eye], (0, tokens), dropout=0.3) != 0
    leaves = [x.requires_grad_() for x in vectors(torch.bfloat16, tokens=tokens, width=width)]
    torch.manual_seed(3)
    out = run(attention_in_c, leaves, (0, tokens), dropout=0.3)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weights = (torch.einsum("ihd,jhd->ihj", exact[0], exact[1]) * 0.25).softmax(-1)
    expected = torch.einsum("ihj,jhd->ihd", weights * mask / 0.7, exact[2])
    upstream = vectors(torch.bfloat16, seed=1, tokens=tokens, width=width)[0]
    out.backward(upstream)
    expected.backward(upstream.double())
    for got, true in [
        (out.detach(), expected.detach()),
        *((x.grad, y.grad) for x, y in zip(leaves, exact, strict=True)),
    ]:
        error = float((got.double() - true).abs().max())
        assert error <= BF16 * max(1.0, float(true.abs().max()))


@needs_c
def test_the_kernel_gives_the_same_bits_for_any_number_of_threads() -> None:
    inputs = [x.requires_grad_() for x in vectors(torch.bfloat16, tokens=60)]

    def bits(threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        out = run(attention_in_c, inputs, (0, 20, 21, 60), dropout=0.1)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        torch.set_num_threads(before)
        return [out, *gradients]

    assert all(torch.equal(a, b) for a, b in zip(bits(1), bits(3), strict=True))


@needs_c
def test_the_kernel_takes_slices_of_a_joint_projection() -> None:
    joint = torch.randn(BOUNDS[-1], 3, HEADS, WIDTH).bfloat16()
    strided = run(attention_in_c, joint.unbind(1))
    assert torch.equal(strided, run(attention_in_c, [x.contiguous() for x in joint.unbind(1)]))


@needs_c
def test_large_scores_stay_finite() -> None:
    inputs = [(x * 100).requires_grad_() for x in vectors(torch.bfloat16)]
    out = run(attention_in_c, inputs)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_called_as_transformers_calls_attention(
    scaling: float | None, dtype: torch.dtype
) -> None:
    q, k, v = vectors(dtype)
    out, weights = packed_attention(
        torch.nn.Identity(),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        None,
        cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32),
        max_seqlen=64,
        scaling=scaling,
        is_causal=False,
        position_bias=None,
    )
    assert weights is None
    assert out.shape == (1, BOUNDS[-1], HEADS, WIDTH)
    expected = oracle(q.double(), k.double(), v.double(), BOUNDS, scaling or WIDTH**-0.5)
    tolerance = 2e-6 if dtype == torch.float32 else BF16
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=3 * tolerance)


@needs_c
def test_a_longest_segment_that_is_said_too_short_does_no_harm() -> None:
    inputs = vectors(torch.bfloat16, tokens=200)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32)
    said_short = attention_in_c(*inputs, cu_seqlens, 3, 0.25, 0.0)
    assert torch.equal(said_short, attention_in_c(*inputs, cu_seqlens, 200, 0.25, 0.0))


# A sliding window


@pytest.mark.parametrize("window", [1, 2, 3, 8, 16, 31])
@pytest.mark.parametrize("lengths", [LENGTHS, (40,), (16, 32), (33, 1, 31), (7, 0, 25)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, BF16)])
def test_a_windows_value_and_gradient_are_those_of_the_keys_within_it(
    window: int, lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    bounds = (0, *itertools.accumulate(lengths))
    leaves = [x.requires_grad_() for x in vectors(dtype, tokens=bounds[-1])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = run(functools.partial(attention_in_window, window=window), leaves, bounds)
    expected = oracle(*exact, bounds, 0.25, window)
    upstream = vectors(dtype, seed=1, tokens=bounds[-1])[0]
    out.backward(upstream)
    expected.backward(upstream.double())
    for got, true in [
        (out.detach(), expected.detach()),
        *((x.grad, y.grad) for x, y in zip(leaves, exact, strict=True)),
    ]:
        error = float((got.double() - true).abs().max())
        assert error <= tolerance * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize(("window", "masks"), [(None, False), (7, False), (6, True), (2, True)])
def test_a_window_is_used_where_a_segment_may_exceed_it(
    window: int | None, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, calls = vectors(torch.float32), []

    def spy(*arguments: object, window: int) -> torch.Tensor:
        calls.append(window)
        return attention_in_window(*arguments, window=window)

    monkeypatch.setattr(attention, "attention_in_window", spy)
    out, _ = packed_attention(
        torch.nn.Identity(),
        *(x.transpose(0, 1)[None] for x in inputs),
        None,
        cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32),
        max_seqlen=max(LENGTHS),
        sliding_window=window,
    )
    assert calls == ([window] if masks else [])
    exact = oracle(*(x.double() for x in inputs), BOUNDS, 0.25, window or 10**9)
    torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=6e-6)
