"""The relation loss as its formula says, dense over the whole packing: slow, large, the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

# T packed tokens, A relation heads, D relation-head size (differs between the two models)


def reference_relation_kl(
    student_TD: torch.Tensor, teacher_TD: torch.Tensor, bounds: Sequence[int], num_heads: int
) -> torch.Tensor:
    """See `pipeline.relation_kl.relation_kl`. Holds [A, T, T]; autograd gives the gradient."""
    dtype = torch.promote_types(
        torch.promote_types(student_TD.dtype, teacher_TD.dtype), torch.float32
    )
    num_tokens = student_TD.shape[0]
    segment_T = torch.zeros(num_tokens, dtype=torch.long, device=student_TD.device)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        segment_T[start:stop] = number
    same_segment_TT = segment_T[:, None] == segment_T[None, :]
    log_s_ATT = _log_relation(student_TD.to(dtype), same_segment_TT, num_heads)
    log_t_ATT = _log_relation(teacher_TD.to(dtype), same_segment_TT, num_heads)
    kl_ATT = log_t_ATT.exp() * (log_t_ATT - log_s_ATT)
    return kl_ATT.sum() / (num_heads * num_tokens)


def _log_relation(
    vectors_TD: torch.Tensor, same_segment_TT: torch.Tensor, num_heads: int
) -> torch.Tensor:
    heads_ATD = vectors_TD.unflatten(1, (num_heads, -1)).transpose(0, 1)
    scores_ATT = heads_ATD @ heads_ATD.transpose(1, 2) * heads_ATD.shape[-1] ** -0.5
    # The lowest finite number, not -inf: its probability is 0 and 0 * (-inf) would be NaN.
    lowest = torch.finfo(scores_ATT.dtype).min
    masked_ATT: torch.Tensor = scores_ATT.masked_fill(~same_segment_TT, lowest)
    return masked_ATT.log_softmax(dim=-1)
