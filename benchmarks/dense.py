"""The relation loss as public code writes it: dense, over a padded batch."""

from __future__ import annotations

import torch
from torch.nn import functional

# B paragraphs, N tokens of the longest, A relation heads, D relation-head size of one model


def dense_relation_kl(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """KL of the relations softmax(X X^T / sqrt(d)), the mean over heads and real tokens.

    Args:
        student: [B, N, d_s], with gradient.
        teacher: [B, N, d_t].
        mask: [B, N], 1 where a token is real.
        num_heads: relation heads.
    """
    log_s_BANN = _scores(student, mask, num_heads).log_softmax(dim=-1)
    t_BANN = _scores(teacher, mask, num_heads).softmax(dim=-1)
    kl_BAN = functional.kl_div(log_s_BANN, t_BANN, reduction="none").sum(dim=-1)
    return (kl_BAN * mask[:, None]).sum() / (num_heads * mask.sum())


def _scores(vectors: torch.Tensor, mask: torch.Tensor, num_heads: int) -> torch.Tensor:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    x_BAND = vectors.to(dtype).unflatten(2, (num_heads, -1)).transpose(1, 2)
    scores_BANN = x_BAND @ x_BAND.transpose(2, 3) / x_BAND.shape[-1] ** 0.5
    return scores_BANN.masked_fill(mask[:, None, None] == 0, torch.finfo(dtype).min)
