"""The relation loss in C, one row of scores at a time: see pipeline/native/relation_kl.c."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from pipeline.native import address, load


def kl_and_gradients(
    student: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher: torch.Tensor,
    teacher_keys: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    *,
    needs_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients of the student's vectors.

    Args:
        student: [T, d_s] on the CPU.
        student_keys: the same, or None where they are `student`.
        teacher: [T, d_t].
        teacher_keys: the same, or None where they are `teacher`.
        cu_seqlens: [segments + 1] int32 on the CPU, not falling; T is at least its last.
        num_heads: relation heads.
        needs_gradient: compute the gradients.

    Returns:
        The mean KL, a scalar in fp64, and no gradient, the student's, or that and its keys', fp32
        and [T, d_s], zero behind the last segment.

    Raises:
        MemoryError: the scratch memory of the longest segment cannot be had.
    """
    kernel = function()
    assert kernel is not None, "ask function() first"
    given = [student, student_keys, teacher, teacher_keys]
    vectors = [None if v is None else v.detach().float().contiguous() for v in given]
    bounds = cu_seqlens.to(torch.int32).contiguous()
    segments = bounds.numel() - 1
    num_terms = num_heads * int(bounds[-1])
    kl = torch.zeros(segments, num_heads, dtype=torch.float64)
    wanted = [v for v in vectors[:2] if v is not None] if needs_gradient else []
    gradients = [torch.zeros_like(v) for v in wanted]
    failed = kernel(
        *(address(v) for v in vectors),
        address(bounds),
        segments,
        num_heads,
        student.shape[1] // num_heads,
        teacher.shape[1] // num_heads,
        1.0 / num_terms,
        *[*map(address, gradients), None, None][:2],
        address(kl),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for segments of {int(bounds.diff().max())} tokens")
    return kl.sum() / num_terms, gradients


@functools.cache
def function() -> Callable[..., int] | None:
    """The compiled function, or None on a machine that cannot compile it."""
    library = load("relation_kl")
    if library is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.relation_kl.argtypes = (
        [pointer] * 5 + [integer] * 4 + [ctypes.c_float] + [pointer] * 3 + [integer]
    )
    return library.relation_kl  # type: ignore[no-any-return]
