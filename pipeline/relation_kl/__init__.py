"""The relation loss of MiniLM and MiniLMv2: one meaning, several implementations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from pipeline.relation_kl.chunked import chunked_relation_kl
from pipeline.relation_kl.reference import reference_relation_kl


def _triton_relation_kl(*arguments: torch.Tensor | int | None) -> torch.Tensor:
    from pipeline.relation_kl.fused import fused_relation_kl  # Triton comes with torch for GPUs

    return fused_relation_kl(*arguments)  # type: ignore[arg-type]


IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "reference": reference_relation_kl,
    "chunked": chunked_relation_kl,
    "triton": _triton_relation_kl,
}


def relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_relation_heads: int,
    *,
    student_keys: torch.Tensor | None = None,
    teacher_keys: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """KL between the teacher's and the student's self-attention relations of one kind.

    With h relation heads, queries (or keys, or values) of a segment X [n, d] are split into h
    parts X_a [n, d/h], and R_a = softmax(X_a X_a^T / sqrt(d/h)) over the segment's own tokens.
    The loss is

        1 / (h N) * sum_a sum_t KL( R^teacher_a,t || R^student_a,t )

    in nats, over the N tokens of the segments: the teacher is the target (MiniLMv2, arXiv
    2012.15828, equations 5 to 8). With keys of their own, Y, the relations are softmax(X Y^T):
    of queries and keys they are the attention distributions, whose loss is MiniLM's (arXiv
    2002.10957, equation 4).

    Args:
        student: [T, d_s] vectors of packed segments; the gradient goes here.
        teacher: [T, d_t] vectors of the same tokens, without gradient; may be an inference tensor.
        cu_seqlens: [segments + 1] int32 boundaries from 0 to N <= T, not falling; a segment may be
            empty, and tokens from N on count for nothing, so that shapes can stay the same. On
            `student`'s device for "triton", which never reads it on the host.
        num_relation_heads: h, which divides d_s and d_t.
        student_keys: [T, d_s]; None is `student`. The gradient goes here too.
        teacher_keys: [T, d_t]; None is `teacher`.
        implementation: "triton" (GPUs, O(T d) memory), "chunked" (any device, one block of scores
            at a time), "reference" (dense, the oracle), or "auto": the first on a GPU, the second
            elsewhere.

    Returns:
        A scalar in fp32 (fp64 where an input is fp64). Scores, softmax and sums are in that type.

    Raises:
        ValueError: shapes or heads do not fit together, or an unknown implementation.
    """
    if implementation == "auto":
        implementation = "triton" if student.is_cuda else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"relation_kl implementation {implementation!r} is unknown; use one of auto, "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    num_tokens = student.shape[0]
    if student.ndim != 2 or teacher.ndim != 2 or teacher.shape[0] != num_tokens:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be [T, d_s] "
            "and [T, d_t] of the same T tokens"
        )
    if (student_keys is None) != (teacher_keys is None):
        raise ValueError("keys are given for one model only, so its relations would be others")
    for name, keys, vectors in (
        ("student", student_keys, student),
        ("teacher", teacher_keys, teacher),
    ):
        if keys is not None and (keys.shape != vectors.shape or keys.dtype != vectors.dtype):
            raise ValueError(
                f"{name}_keys {tuple(keys.shape)} {keys.dtype} must be like {name} "
                f"{tuple(vectors.shape)} {vectors.dtype}"
            )
        if num_relation_heads < 1 or vectors.shape[1] % num_relation_heads:
            raise ValueError(
                f"{num_relation_heads} relation heads do not divide the {name}'s width "
                f"{vectors.shape[1]}"
            )
    if not cu_seqlens.is_cuda:
        _check_bounds(cu_seqlens.tolist(), num_tokens)
    return IMPLEMENTATIONS[implementation](
        student, teacher, student_keys, teacher_keys, cu_seqlens, num_relation_heads
    )


def _check_bounds(bounds: list[int], num_tokens: int) -> None:
    falls = any(start > stop for start, stop in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or falls or not 0 < bounds[-1] <= num_tokens:
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall and end above 0 and by T={num_tokens}, not "
            f"{bounds[:8]}"
        )


__all__ = ["IMPLEMENTATIONS", "relation_kl"]
