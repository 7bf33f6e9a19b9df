"""The relation loss in two Triton kernels, with its gradient in the same call.

For S = X Y^T / sqrt(d) and P = softmax(S), the gradient of KL(P^teacher || P^student) with respect
to S is G = P^student - P^teacher, so dX = G Y / sqrt(d) and dY = G^T X / sqrt(d). The first kernel
sweeps each query's keys once with a running softmax and leaves the rows' log-normalisers and KL;
the second forms the tiles of G again from those. Where the keys are the queries, S is symmetric and
one score tile serves both terms. No tile leaves its program: memory is O(T d) plus O(T h), nothing
of the teacher is kept for the backward pass, and that pass is one multiplication.
"""

# The kernels are written in Triton's language, to which Python's types do not apply.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# T packed tokens, A relation heads, Q queries and K keys of a tile, D relation-head size

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HOST_INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter multiplies bf16 matrices as though their bits were integers.
_INTERPRETED = tl.constexpr(_HOST_INTERPRETED)
_LARGE = tl.constexpr(1e30)  # stands for infinity where infinity minus itself would make NaN
# G is formed as 2^14 G: |G + G^T| <= 2 stays below fp16's largest number, and what is small next
# to 1, as nearly all of it is late in training, does not fall into fp16's subnormal numbers.
_SHIFT = tl.constexpr(14.0)
_UNSHIFT = tl.constexpr(2.0**-14)
_LOG2_E = tl.constexpr(math.log2(math.e))


class _Tile(NamedTuple):
    block: int  # rows of a program
    swept: int  # rows of each block that it sweeps
    num_warps: int
    num_stages: int


# By the larger padded head size of the two models. A product of 64 rows is the least that four
# warps give to Hopper's tensor cores. Two 64 x 64 score tiles in fp32 are 64 registers a thread;
# with probabilities and masks that makes 95 to 170, so three to five programs share a processor,
# and the arithmetic of one hides the exponentials of another: larger tiles would leave one or two.
# At 128 the gradient's own block takes another 64 registers: half the columns. Shared memory holds
# num_stages blocks of both models' swept rows, 12 to 66 KiB.
_TILES = {
    16: _Tile(64, 64, 4, 2),
    32: _Tile(64, 64, 4, 2),
    64: _Tile(64, 64, 4, 2),
    128: _Tile(64, 32, 4, 2),
}
# Exact fp32 products run without tensor cores and hold their operands in registers; the first
# kernel spills a few of them at 128.
_TILES_FP32 = {
    16: _Tile(32, 32, 4, 2),
    32: _Tile(32, 32, 4, 2),
    64: _Tile(32, 32, 4, 2),
    128: _Tile(32, 32, 8, 2),
}


def fused_relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """See `pipeline.relation_kl.relation_kl`. The host never waits for the device.

    Queries relate to the keys of their own segment; where keys are None, to the queries
    themselves. The gradient goes to the student's queries and keys.

    Args:
        student: [T, d_s] queries in bf16, fp16 or fp32.
        teacher: [T, d_t] queries, without gradient; may be an inference tensor.
        student_keys: [T, d_s] of the student's dtype, or None.
        teacher_keys: [T, d_t] of the teacher's dtype, or None.
        cu_seqlens: [segments + 1] int32 boundaries, from 0 and never falling, on the same device.
            Equal neighbours are empty segments. Tokens from cu_seqlens[-1] on are padding: they
            count for nothing and get gradient 0. Its values are not checked, for that would
            wait for the device.
        num_heads: h, which divides d_s and d_t.

    Returns:
        A scalar in fp32: 0 where every token is padding.

    Raises:
        ValueError: shapes, dtypes, devices or heads do not fit together, or are not supported.
    """
    _check(student, student_keys, cu_seqlens, num_heads, "student")
    _check(teacher, teacher_keys, cu_seqlens, num_heads, "teacher")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be of the "
            "same T tokens"
        )
    if (student_keys is None) != (teacher_keys is None):
        raise ValueError("keys are given for one model only, so its relations would be others")
    needs_grad = torch.is_grad_enabled() and (
        student.requires_grad or (student_keys is not None and student_keys.requires_grad)
    )
    loss: torch.Tensor
    loss, _, _ = _relation_kl(
        student, teacher, student_keys, teacher_keys, cu_seqlens, num_heads, needs_grad
    )
    return loss


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    name: str,
) -> None:
    if queries.ndim != 2:
        raise ValueError(f"{name} {tuple(queries.shape)} must be [T, d]")
    if queries.dtype not in _DTYPES:
        raise ValueError(
            f"the fused relation loss takes bf16, fp16 and fp32, not the {name}'s "
            f'{queries.dtype}; use implementation "chunked"'
        )
    if keys is not None and (keys.shape != queries.shape or keys.dtype != queries.dtype):
        raise ValueError(
            f"{name}'s keys {tuple(keys.shape)} in {keys.dtype} must be as its queries, "
            f"{tuple(queries.shape)} in {queries.dtype}"
        )
    width = queries.shape[1]
    if num_heads < 1 or width < num_heads or width % num_heads:
        raise ValueError(f"{num_heads} relation heads do not divide the {name}'s width {width}")
    if width // num_heads > max(_TILES):
        raise ValueError(
            f"the fused relation loss takes relation heads of at most {max(_TILES)}, not the "
            f'{name}\'s {width // num_heads}; use implementation "chunked"'
        )
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0] or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} in {cu_seqlens.dtype} must be "
            "[segments + 1] in torch.int32"
        )
    if not queries.is_cuda and not _HOST_INTERPRETED:
        raise ValueError(
            f"the fused relation loss needs a GPU, not {queries.device}; use implementation "
            '"chunked", or set TRITON_INTERPRET=1'
        )
    for tensor in (cu_seqlens, *(() if keys is None else (keys,))):
        if tensor.device != queries.device:
            raise ValueError(f"{name} is on {queries.device}, other inputs on {tensor.device}")


@torch.library.custom_op("minilm::relation_kl", mutates_args=())
def _relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and its fp32 gradients: of shape [0] where not needed or without keys."""
    num_tokens = student.shape[0]
    x_s, x_t = _rows(student), _rows(teacher)
    y_s = x_s if student_keys is None else _rows(student_keys)
    y_t = x_t if teacher_keys is None else _rows(teacher_keys)
    segments = _segments(cu_seqlens, num_tokens)
    count = cu_seqlens[-1:].clamp(min=1)
    lse_s, lse_t, kl = student.new_empty((3, num_heads, num_tokens), dtype=torch.float32).unbind()
    launch = _Launch(student, teacher, num_heads)
    launch(_statistics_kernel, x_s, y_s, x_t, y_t, *segments, lse_s, lse_t, kl)
    loss = (kl.sum(dtype=torch.float64) / (count[0] * num_heads)).float()

    gradient = _new_gradient(student, needs_grad)
    gradient_keys = _new_gradient(student, needs_grad and student_keys is not None)
    known = (*segments, lse_s, lse_t, count)
    if needs_grad and student_keys is None:
        launch(
            _gradient_kernel, x_s, x_s, x_t, x_t, *known, gradient, FOR_QUERIES=True, FOR_KEYS=True
        )
    elif needs_grad:
        for_queries = (x_s, y_s, x_t, y_t, *known, gradient)
        for_keys = (y_s, x_s, y_t, x_t, *known, gradient_keys)
        launch(_gradient_kernel, *for_queries, FOR_QUERIES=True, FOR_KEYS=False)
        launch(_gradient_kernel, *for_keys, FOR_QUERIES=False, FOR_KEYS=True)
    return loss, gradient, gradient_keys


@_relation_kl.register_fake
def _(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        student.new_empty((), dtype=torch.float32),
        _new_gradient(student, needs_grad),
        _new_gradient(student, needs_grad and student_keys is not None),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    student, _, student_keys, *_ = inputs
    _, gradient, gradient_keys = output
    ctx.mark_non_differentiable(gradient, gradient_keys)
    ctx.save_for_backward(gradient, gradient_keys)
    ctx.dtype, ctx.has_keys = student.dtype, student_keys is not None


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
    gradient, gradient_keys = ctx.saved_tensors
    # Rounded once, after a loss scale has lifted what fp16 would round to nothing.
    for_queries = (gradient * grad_loss).to(ctx.dtype)
    for_keys = (gradient_keys * grad_loss).to(ctx.dtype) if ctx.has_keys else None
    return for_queries, None, for_keys, None, None, None, None


_relation_kl.register_autograd(_backward, setup_context=_setup_context)


def _new_gradient(student: torch.Tensor, needed: bool) -> torch.Tensor:
    return student.new_empty(student.shape if needed else (0,), dtype=torch.float32)


def _rows(vectors_TD: torch.Tensor) -> torch.Tensor:
    """The kernels take any distance between rows, as in a slice of a joint projection."""
    return vectors_TD if vectors_TD.stride(1) == 1 else vectors_TD.contiguous()


def _segments(cu_seqlens: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's first key and the key after its last, [T] each; padding has none.

    For a padding token both are cu_seqlens[-1], so that the keys of any run of tokens lie from
    its first token's begin to its last token's end.
    """
    token_T = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    # Of equal boundaries the last counts: empty segments have no tokens.
    following_T = torch.searchsorted(cu_seqlens, token_T, right=True)
    bounds = torch.cat((cu_seqlens, cu_seqlens[-1:]))
    return bounds[following_T - 1], bounds[following_T]


class _Launch:
    """Calls a kernel over all heads and blocks of tokens of a pair of models."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, num_heads: int) -> None:
        self.num_tokens = student.shape[0]
        self.num_heads = num_heads
        self.sizes = student.shape[1] // num_heads, teacher.shape[1] // num_heads

    def __call__(self, kernel: Any, *tensors: torch.Tensor, **flags: bool) -> None:
        size_s, size_t = self.sizes
        padded_s, padded_t = (max(16, triton.next_power_of_2(size)) for size in self.sizes)
        is_fp32 = torch.float32 in (tensors[0].dtype, tensors[2].dtype)
        tile = (_TILES_FP32 if is_fp32 else _TILES)[max(padded_s, padded_t)]
        if not self.num_tokens:
            return
        # Heads come first: programs at the same rows run together and share their cache lines.
        grid = (self.num_heads, triton.cdiv(self.num_tokens, tile.block))
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](
                *tensors,
                self.num_tokens,
                *(vectors.stride(0) for vectors in tensors[:4]),
                size_s**-0.5,
                size_t**-0.5,
                SIZE_S=size_s,
                SIZE_T=size_t,
                PADDED_S=padded_s,
                PADDED_T=padded_t,
                BLOCK=tile.block,
                SWEPT=tile.swept,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **flags,
            )


@triton.jit
def _load_head(vectors, rows, inside, stride, head, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of one head, [rows, PADDED], with zeros beyond SIZE and where not inside."""
    columns = tl.arange(0, PADDED)
    places = rows.to(tl.int64)[:, None] * stride + (head * SIZE + columns)[None, :]
    mask = inside[:, None] & (columns < SIZE)[None, :]
    return tl.load(vectors + places, mask=mask, other=0.0)


@triton.jit
def _dot(left, right):
    """Product in fp32; operands of 16 bits go to the tensor cores as they are."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def _statistics_kernel(
    x_s,
    y_s,
    x_t,
    y_t,
    begins,
    ends,
    lse_s,
    lse_t,
    kl,
    num_tokens,
    stride_x_s,
    stride_y_s,
    stride_x_t,
    stride_y_t,
    scale_s,
    scale_t,
    SIZE_S: tl.constexpr,
    SIZE_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEPT: tl.constexpr,
):
    """Log-normalisers (base 2) and KL (nats) of BLOCK queries of a head, [A, T] each."""
    head = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    q = first + tl.arange(0, BLOCK)
    is_token = q < num_tokens
    begin_Q = tl.load(begins + q, mask=is_token, other=0)
    end_Q = tl.load(ends + q, mask=is_token, other=0)
    xs_QD = _load_head(x_s, q, is_token, stride_x_s, head, SIZE_S, PADDED_S)
    xt_QD = _load_head(x_t, q, is_token, stride_x_t, head, SIZE_T, PADDED_T)
    max_s_Q = tl.full((BLOCK,), -_LARGE, tl.float32)
    max_t_Q = tl.full((BLOCK,), -_LARGE, tl.float32)
    sum_s_Q = tl.zeros((BLOCK,), tl.float32)
    sum_t_Q = tl.zeros((BLOCK,), tl.float32)
    cross_Q = tl.zeros((BLOCK,), tl.float32)  # sum of exp(t - max_t) (t - s)
    stop = tl.load(ends + tl.minimum(first + BLOCK, num_tokens) - 1)
    for start in range(tl.load(begins + first), stop, SWEPT):
        k = start + tl.arange(0, SWEPT)
        ys_KD = _load_head(y_s, k, k < stop, stride_y_s, head, SIZE_S, PADDED_S)
        yt_KD = _load_head(y_t, k, k < stop, stride_y_t, head, SIZE_T, PADDED_T)
        s_QK = _dot(xs_QD, tl.trans(ys_KD)) * (scale_s * _LOG2_E)
        t_QK = _dot(xt_QD, tl.trans(yt_KD)) * (scale_t * _LOG2_E)
        same_segment_QK = (k[None, :] >= begin_Q[:, None]) & (k[None, :] < end_Q[:, None])
        excess_QK = t_QK - s_QK
        s_QK = tl.where(same_segment_QK, s_QK, float("-inf"))
        t_QK = tl.where(same_segment_QK, t_QK, float("-inf"))
        new_s_Q = tl.maximum(max_s_Q, tl.max(s_QK, 1))
        new_t_Q = tl.maximum(max_t_Q, tl.max(t_QK, 1))
        p_s_QK = tl.exp2(s_QK - new_s_Q[:, None])
        p_t_QK = tl.exp2(t_QK - new_t_Q[:, None])
        shrink_t_Q = tl.exp2(max_t_Q - new_t_Q)
        sum_s_Q = sum_s_Q * tl.exp2(max_s_Q - new_s_Q) + tl.sum(p_s_QK, 1)
        sum_t_Q = sum_t_Q * shrink_t_Q + tl.sum(p_t_QK, 1)
        cross_Q = cross_Q * shrink_t_Q + tl.sum(p_t_QK * excess_QK, 1)
        max_s_Q = new_s_Q
        max_t_Q = new_t_Q
    counts_Q = begin_Q < end_Q
    sum_s_Q = tl.where(counts_Q, sum_s_Q, 1.0)
    sum_t_Q = tl.where(counts_Q, sum_t_Q, 1.0)
    # A normaliser without bound: all of padding's probabilities are 0.
    log_s_Q = tl.where(counts_Q, max_s_Q + tl.log2(sum_s_Q), _LARGE)
    log_t_Q = tl.where(counts_Q, max_t_Q + tl.log2(sum_t_Q), _LARGE)
    kl_Q = (cross_Q / sum_t_Q + log_s_Q - log_t_Q) / _LOG2_E
    place = head * num_tokens + q
    tl.store(lse_s + place, log_s_Q, mask=is_token)
    tl.store(lse_t + place, log_t_Q, mask=is_token)
    tl.store(kl + place, kl_Q, mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def _gradient_kernel(
    x_s,
    y_s,
    x_t,
    y_t,
    begins,
    ends,
    lse_s,
    lse_t,
    count,
    gradient,
    num_tokens,
    stride_x_s,
    stride_y_s,
    stride_x_t,
    stride_y_t,
    scale_s,
    scale_t,
    SIZE_S: tl.constexpr,
    SIZE_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEPT: tl.constexpr,
    FOR_QUERIES: tl.constexpr,
    FOR_KEYS: tl.constexpr,
):
    """Gradient of the loss with respect to BLOCK rows of x_s, [T, A D].

    Rows x are queries to the keys y (FOR_QUERIES: G y), keys of the queries y (FOR_KEYS: G^T y),
    or, where x is y, both.
    """
    head = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    q = first + tl.arange(0, BLOCK)
    is_token = q < num_tokens
    begin_Q = tl.load(begins + q, mask=is_token, other=0)
    end_Q = tl.load(ends + q, mask=is_token, other=0)
    xs_QD = _load_head(x_s, q, is_token, stride_x_s, head, SIZE_S, PADDED_S)
    xt_QD = _load_head(x_t, q, is_token, stride_x_t, head, SIZE_T, PADDED_T)
    lse_s += head * num_tokens
    lse_t += head * num_tokens
    lse_s_Q = tl.load(lse_s + q, mask=is_token, other=0.0) - _SHIFT
    lse_t_Q = tl.load(lse_t + q, mask=is_token, other=0.0) - _SHIFT
    gradient_QD = tl.zeros((BLOCK, PADDED_S), tl.float32)
    stop = tl.load(ends + tl.minimum(first + BLOCK, num_tokens) - 1)
    for start in range(tl.load(begins + first), stop, SWEPT):
        k = start + tl.arange(0, SWEPT)
        ys_KD = _load_head(y_s, k, k < stop, stride_y_s, head, SIZE_S, PADDED_S)
        yt_KD = _load_head(y_t, k, k < stop, stride_y_t, head, SIZE_T, PADDED_T)
        s_QK = _dot(xs_QD, tl.trans(ys_KD)) * (scale_s * _LOG2_E)
        t_QK = _dot(xt_QD, tl.trans(yt_KD)) * (scale_t * _LOG2_E)
        g_QK = tl.zeros((BLOCK, SWEPT), tl.float32)
        if FOR_QUERIES:
            g_QK += tl.exp2(s_QK - lse_s_Q[:, None]) - tl.exp2(t_QK - lse_t_Q[:, None])
        if FOR_KEYS:
            lse_s_K = tl.load(lse_s + k, mask=k < stop, other=0.0) - _SHIFT
            lse_t_K = tl.load(lse_t + k, mask=k < stop, other=0.0) - _SHIFT
            g_QK += tl.exp2(s_QK - lse_s_K[None, :]) - tl.exp2(t_QK - lse_t_K[None, :])
        same_segment_QK = (k[None, :] >= begin_Q[:, None]) & (k[None, :] < end_Q[:, None])
        g_QK = tl.where(same_segment_QK, g_QK, 0.0)
        gradient_QD += _dot(g_QK.to(ys_KD.dtype), ys_KD)
    factor = scale_s * _UNSHIFT / (tl.load(count).to(tl.float32) * tl.num_programs(0))
    columns = tl.arange(0, PADDED_S)
    places = q.to(tl.int64)[:, None] * (tl.num_programs(0) * SIZE_S) + (head * SIZE_S + columns)
    mask = is_token[:, None] & (columns < SIZE_S)[None, :]
    tl.store(gradient + places, gradient_QD * factor, mask=mask)
