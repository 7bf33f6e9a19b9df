"""The relation loss segment by segment and block by block, with its gradient in the same pass.

For S = x y^T / sqrt(d) and P = softmax(S), the gradient of KL(P^teacher || P^student) with respect
to S is G = P^student - P^teacher; with respect to x it is G y / sqrt(d), and to y G^T x / sqrt(d),
which fall on the same vectors where y is x. All of them come from the block of queries at hand, so
no [n, n] matrix outlives its block, nothing of the teacher is kept for the backward pass, and that
pass is one multiplication.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pipeline.relation_kl import native

BLOCK_ELEMENTS = 1 << 18  # scores in a block, 1 MiB in fp32: two blocks stay in a core's cache

# A relation heads, N tokens of a segment, Q queries of a block, D relation-head size


def chunked_relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """See `pipeline.relation_kl.relation_kl`. Memory is O(T d) and one block of scores.

    On a CPU with a C compiler the blocks are rows, in `native`; elsewhere torch's operations.
    """
    loss: torch.Tensor = _ChunkedRelationKL.apply(  # type: ignore[no-untyped-call]
        student, student_keys, teacher, teacher_keys, cu_seqlens, num_heads
    )
    return loss


class _ChunkedRelationKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        student_keys: torch.Tensor | None,
        teacher: torch.Tensor,
        teacher_keys: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        num_heads: int,
    ) -> torch.Tensor:
        dtype = torch.promote_types(
            torch.promote_types(student.dtype, teacher.dtype), torch.float32
        )
        on_cpu = student.device.type == "cpu" and dtype == torch.float32
        compute = native.kl_and_gradients if on_cpu and native.function() else _kl_and_gradients
        loss, gradients = compute(
            student,
            student_keys,
            teacher,
            teacher_keys,
            cu_seqlens,
            num_heads,
            needs_gradient=any(ctx.needs_input_grad[:2]),
        )
        ctx.save_for_backward(*gradients)
        ctx.student_dtype = student.dtype
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        # Rounded once, after a loss scale has lifted what fp16 would round to nothing.
        scaled = [(gradient * grad_output).to(ctx.student_dtype) for gradient in ctx.saved_tensors]
        return (*scaled, None)[:2] + (None,) * 4


def _kl_and_gradients(
    student: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher: torch.Tensor,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    *,
    needs_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `native.kl_and_gradients`, with torch's operations, on any device and in fp64 too."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    bounds = cu_seqlens.tolist()
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    wanted = [student] if student_keys is None else [student, student_keys]
    gradients = [torch.zeros_like(v, dtype=dtype) for v in wanted] if needs_gradient else []
    for start, stop in itertools.pairwise(bounds):
        if start == stop:
            continue
        x_AND, teacher_x_AND = (
            _split(vectors[start:stop].to(dtype), num_heads) for vectors in (student, teacher)
        )
        y_AND, teacher_y_AND = (
            own if keys is None else _split(keys[start:stop].to(dtype), num_heads)
            for own, keys in ((x_AND, student_keys), (teacher_x_AND, teacher_keys))
        )
        parts = _accumulate(x_AND, y_AND, teacher_x_AND, teacher_y_AND, total, needs_gradient)
        for gradient, part_AND in zip(gradients, parts, strict=False):
            gradient[start:stop] = part_AND.transpose(0, 1).flatten(1)
    num_terms = num_heads * bounds[-1]
    return total / num_terms, [gradient.div_(num_terms) for gradient in gradients]


def _split(vectors_ND: torch.Tensor, num_heads: int) -> torch.Tensor:
    heads_NAD: torch.Tensor = vectors_ND.unflatten(1, (num_heads, -1))
    return heads_NAD.transpose(0, 1).contiguous()


def _accumulate(
    x_AND: torch.Tensor,
    y_AND: torch.Tensor,
    teacher_x_AND: torch.Tensor,
    teacher_y_AND: torch.Tensor,
    total: torch.Tensor,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[()]:
    """Add a segment's summed KL to `total`; return the gradients of x and y where needed.

    Where y is x, both are one tensor, the sum.
    """
    num_heads, num_tokens, _ = x_AND.shape
    block = max(1, BLOCK_ELEMENTS // (num_heads * num_tokens))
    y_ADN, teacher_y_ADN = y_AND.transpose(1, 2), teacher_y_AND.transpose(1, 2)
    scale, teacher_scale = x_AND.shape[-1] ** -0.5, teacher_x_AND.shape[-1] ** -0.5
    gradient_x_AND = torch.zeros_like(x_AND) if needs_gradient else x_AND
    gradient_y_AND = torch.zeros_like(y_AND) if y_AND is not x_AND else gradient_x_AND
    for start in range(0, num_tokens, block):
        x_AQD, teacher_x_AQD = (x[:, start : start + block] for x in (x_AND, teacher_x_AND))
        log_s_AQN = (x_AQD @ y_ADN * scale).log_softmax(dim=-1)
        log_t_AQN = (teacher_x_AQD @ teacher_y_ADN * teacher_scale).log_softmax(dim=-1)
        t_AQN = log_t_AQN.exp()
        total += (t_AQN * (log_t_AQN - log_s_AQN)).sum()
        if needs_gradient:
            g_AQN = (log_s_AQN.exp() - t_AQN) * scale
            gradient_x_AND[:, start : start + block] += g_AQN @ y_AND
            gradient_y_AND += g_AQN.transpose(1, 2) @ x_AQD
    return (gradient_x_AND, gradient_y_AND) if needs_gradient else ()
