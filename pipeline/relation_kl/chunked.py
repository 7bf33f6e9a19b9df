"""The relation loss segment by segment and block by block, with its gradient in the same pass.

For S = s s^T / sqrt(d) and P = softmax(S), the gradient of KL(P^teacher || P^student) with respect
to S is G = P^student - P^teacher, and with respect to s it is (G + G^T) s / sqrt(d). Both terms
come from the block of queries at hand, so no [n, n] matrix outlives its block, nothing of the
teacher is kept for the backward pass, and that pass is one multiplication.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

BLOCK_ELEMENTS = 1 << 18  # scores in a block, 1 MiB in fp32: two blocks stay in a core's cache

# A relation heads, N tokens of a segment, Q queries of a block, D relation-head size


def chunked_relation_kl(
    student: torch.Tensor, teacher: torch.Tensor, bounds: Sequence[int], num_heads: int
) -> torch.Tensor:
    """See `pipeline.relation_kl.relation_kl`. Memory is O(T d) and one block of scores."""
    loss: torch.Tensor = _ChunkedRelationKL.apply(  # type: ignore[no-untyped-call]
        student, teacher, bounds, num_heads
    )
    return loss


class _ChunkedRelationKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        bounds: Sequence[int],
        num_heads: int,
    ) -> torch.Tensor:
        dtype = torch.promote_types(
            torch.promote_types(student.dtype, teacher.dtype), torch.float32
        )
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student, dtype=dtype) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start, stop in itertools.pairwise(bounds):
            segment_gradient = _accumulate(
                _split(student[start:stop].to(dtype), num_heads),
                _split(teacher[start:stop].to(dtype), num_heads),
                total,
                needs_gradient,
            )
            if gradient is not None and segment_gradient is not None:
                gradient[start:stop] = segment_gradient.transpose(0, 1).flatten(1)
        count = num_heads * student.shape[0]
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(count))
            ctx.student_dtype = student.dtype
        return (total / count).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        # Rounded once, after a loss scale has lifted what fp16 would round to nothing.
        return (gradient * grad_output).to(ctx.student_dtype), None, None, None


def _split(vectors_ND: torch.Tensor, num_heads: int) -> torch.Tensor:
    heads_NAD: torch.Tensor = vectors_ND.unflatten(1, (num_heads, -1))
    return heads_NAD.transpose(0, 1).contiguous()


def _accumulate(
    student_AND: torch.Tensor, teacher_AND: torch.Tensor, total: torch.Tensor, needs_gradient: bool
) -> torch.Tensor | None:
    """Add a segment's summed KL to `total`; return its gradient [A, N, D] where it is needed."""
    num_heads, num_tokens, _ = student_AND.shape
    block = max(1, BLOCK_ELEMENTS // (num_heads * num_tokens))
    student_ADN, teacher_ADN = student_AND.transpose(1, 2), teacher_AND.transpose(1, 2)
    student_scale, teacher_scale = student_AND.shape[-1] ** -0.5, teacher_AND.shape[-1] ** -0.5
    gradient_AND = torch.zeros_like(student_AND) if needs_gradient else None
    for start in range(0, num_tokens, block):
        queries_AQD = student_AND[:, start : start + block]
        log_s_AQN = (queries_AQD @ student_ADN * student_scale).log_softmax(dim=-1)
        log_t_AQN = (
            teacher_AND[:, start : start + block] @ teacher_ADN * teacher_scale
        ).log_softmax(dim=-1)
        t_AQN = log_t_AQN.exp()
        total += (t_AQN * (log_t_AQN - log_s_AQN)).sum()
        if gradient_AND is not None:
            g_AQN = (log_s_AQN.exp() - t_AQN) * student_scale
            gradient_AND[:, start : start + block] += g_AQN @ student_AND
            gradient_AND += g_AQN.transpose(1, 2) @ queries_AQD
    return gradient_AND
