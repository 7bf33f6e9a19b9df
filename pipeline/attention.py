"""Attention over packed segments, as transformers' attention functions are called."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nested import nested_tensor_from_jagged
from torch.nn.functional import pad, scaled_dot_product_attention

from pipeline.native import address, load

PACKED = "packed_segments"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Every token attends to its own segment only, exactly as if segments came one at a time.

    Scores, softmax and sums are in fp32 where the vectors are bf16.

    Args:
        module: the attention layer; unused.
        query: [1, heads, T, d].
        key: [1, heads, T, d].
        value: [1, heads, T, d].
        attention_mask: None; segments are the mask.
        cu_seqlens: [segments + 1] int32 segment boundaries from 0 to T.
        max_seqlen: tokens of the longest segment, or more.
        scaling: of the scores; None is 1/sqrt(d).
        dropout: of the attention weights.
        sliding_window: tokens of a segment see those fewer places away than this; None is all.
        unused: whatever else transformers passes on.

    Returns:
        [1, T, heads, d], and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend: Callable[..., torch.Tensor]
    if sliding_window is not None and sliding_window < max_seqlen:
        attend = functools.partial(attention_in_window, window=sliding_window)
    elif query.is_cuda:
        attend = jagged_attention
    elif query.dtype == torch.bfloat16 and query.shape[-1] % 16 == 0 and _library() is not None:
        attend = attention_in_c
    else:
        attend = attention_by_segment
    # squeeze, whose gradient is a view: that of indexing is a copy into zeros
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, cu_seqlens, max_seqlen, scale, dropout)[None], None


def jagged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """On a GPU: FlashAttention's kernel for segments of any length, through jagged tensors.

    `max_seqlen` is given so that the host need not wait to learn it. Vectors are [T, heads, d].
    """
    q, k, v = (
        nested_tensor_from_jagged(x, cu_seqlens, min_seqlen=0, max_seqlen=max_seqlen)
        for x in (query, key, value)
    )
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout, scale=scale
    )
    return out.transpose(1, 2).values()


def attention_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """On a CPU in any precision: torch's kernel on one segment after the other."""
    lengths = cu_seqlens.diff().tolist()
    segments = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        for q, k, v in segments
    ]
    return torch.cat(parts, dim=1).transpose(0, 1)


def attention_in_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    dropout: float,
    *,
    window: int,
) -> torch.Tensor:
    """On any device: torch's kernel on blocks of `window` tokens with `window` - 1 on either side.

    O(T x window) time and memory however long the segments are, and the host learns nothing of
    them. Vectors are [T, heads, d].
    """
    num_tokens, reach = query.shape[0], window - 1
    tail = -num_tokens % window
    ends = (reach, reach + tail)
    places = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=query.device)
    segment = torch.searchsorted(cu_seqlens, places, right=True)
    # What fills the ends is a segment of its own, so that no row of scores is all masked.
    queries = pad(segment, (0, tail)).view(-1, window, 1)
    keys = pad(segment, ends).unfold(0, window + 2 * reach, window)[:, None, :]
    distance = torch.arange(window, device=query.device)[:, None] + reach
    distance = (distance - torch.arange(window + 2 * reach, device=query.device)).abs()
    mask = (queries == keys) & (distance < window)
    q = pad(query, (0, 0, 0, 0, 0, tail)).unflatten(0, (-1, window)).transpose(1, 2)
    k, v = (
        pad(x, (0, 0, 0, 0, *ends)).unfold(0, window + 2 * reach, window).transpose(2, 3)
        for x in (key, value)
    )
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], dropout_p=dropout, scale=scale
    )
    return out.transpose(1, 2).flatten(0, 1)[:num_tokens]


def attention_in_c(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """On a CPU with AVX512-BF16: pipeline/native/attention.c. bf16, d a multiple of 16."""
    seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if dropout else 0
    longest = int(cu_seqlens.diff().max())  # the kernel's memory depends on it: not taken on trust
    rows = (_side_by_side(x) for x in (query, key, value))
    out: torch.Tensor = _AttentionInC.apply(  # type: ignore[no-untyped-call]
        *rows, cu_seqlens.int(), longest, scale, dropout, seed
    )
    return out


class _AttentionInC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        longest: int,
        scale: float,
        dropout: float,
        seed: int,
    ) -> torch.Tensor:
        library = _library()
        assert library is not None
        num_tokens, heads, d = query.shape
        out = torch.empty(num_tokens, heads, d, dtype=query.dtype)
        trains = any(ctx.needs_input_grad[:3])
        lse = torch.empty(num_tokens, heads) if trains else None
        segments = cu_seqlens.numel() - 1
        ctx.arguments = (segments, heads, d, longest, scale, dropout, seed)
        _check(
            library.attention_forward(
                *map(address, (query, key, value)),
                query.stride(0),
                address(cu_seqlens),
                *ctx.arguments,
                address(out),
                address(lse),
                torch.get_num_threads(),
            ),
            longest,
        )
        if trains:
            ctx.save_for_backward(query, key, value, cu_seqlens, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:  # type: ignore[override]
        library = _library()
        assert library is not None
        query, key, value, cu_seqlens, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()  # kept by name: C sees an address only
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        _check(
            library.attention_backward(
                *map(address, (query, key, value)),
                query.stride(0),
                address(cu_seqlens),
                *ctx.arguments,
                *map(address, (out, lse, grad_out, *gradients)),
                torch.get_num_threads(),
            ),
            ctx.arguments[3],
        )
        return (*gradients, *(None,) * 5)


def _check(failed: int, longest: int) -> None:
    if failed:
        raise MemoryError(f"no memory for attention over segments of {longest} tokens")


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, d] whose heads lie side by side; copied only where they do not."""
    _, heads, d = x.shape
    return x if x.stride() == (heads * d, d, 1) else x.contiguous()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled or the CPU has no AVX512-BF16."""
    library = load("attention")
    if library is None or not ctypes.c_int.in_dll(library, "supported").value:
        return None
    pointer, integer, double = ctypes.c_void_p, ctypes.c_int, ctypes.c_double
    common: list[Any] = [pointer] * 3 + [ctypes.c_int64, pointer] + [integer] * 4
    common += [ctypes.c_float, double, ctypes.c_uint64]
    library.attention_forward.argtypes = [*common, *[pointer] * 2, integer]
    library.attention_backward.argtypes = [*common, *[pointer] * 6, integer]
    return library
