"""MiniLMv2's relation loss: one meaning, several implementations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from pipeline.relation_kl.chunked import chunked_relation_kl
from pipeline.relation_kl.reference import reference_relation_kl

IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "reference": reference_relation_kl,
    "chunked": chunked_relation_kl,
}


def relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_relation_heads: int,
    *,
    implementation: str = "chunked",
) -> torch.Tensor:
    """KL between the teacher's and the student's self-attention relations of one kind.

    With h relation heads, queries (or keys, or values) of a segment X [n, d] are split into h
    parts X_a [n, d/h], and R_a = softmax(X_a X_a^T / sqrt(d/h)) over the segment's own tokens.
    The loss is

        1 / (h T) * sum_a sum_t KL( R^teacher_a,t || R^student_a,t )

    in nats: the teacher is the target (MiniLMv2, arXiv 2012.15828, equations 5 to 8).

    Args:
        student: [T, d_s] vectors of packed segments; the gradient goes here.
        teacher: [T, d_t] vectors of the same tokens, without gradient; may be an inference tensor.
        cu_seqlens: [segments + 1] int32 boundaries from 0 to T; every token counts, so leave
            padding out of the packing.
        num_relation_heads: h, which divides d_s and d_t.
        implementation: "chunked" (any device, O(T) memory) or "reference" (dense, the oracle).

    Returns:
        A scalar in fp32 (fp64 where an input is fp64). Scores, softmax and sums are in that type.

    Raises:
        ValueError: shapes or heads do not fit together, or an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"relation_kl implementation {implementation!r} is unknown; use one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    num_tokens = student.shape[0]
    if student.ndim != 2 or teacher.ndim != 2 or teacher.shape[0] != num_tokens:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be [T, d_s] "
            "and [T, d_t] of the same T tokens"
        )
    for name, width in (("student", student.shape[1]), ("teacher", teacher.shape[1])):
        if num_relation_heads < 1 or width % num_relation_heads:
            raise ValueError(
                f"{num_relation_heads} relation heads do not divide the {name}'s width {width}"
            )
    bounds = cu_seqlens.tolist()
    rises = all(start < stop for start, stop in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != num_tokens or not rises:
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to T={num_tokens}, not {bounds[:8]}"
        )
    return IMPLEMENTATIONS[implementation](student, teacher, bounds, num_relation_heads)


__all__ = ["IMPLEMENTATIONS", "relation_kl"]
