"""The relation loss as its formula says, dense over the whole packing: slow, large, the oracle."""

from __future__ import annotations

import itertools

import torch

# T packed tokens, N of them in segments, A relation heads, D relation-head size of one model


def reference_relation_kl(
    student_TD: torch.Tensor,
    teacher_TD: torch.Tensor,
    student_keys_TD: torch.Tensor | None,
    teacher_keys_TD: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """See `pipeline.relation_kl.relation_kl`. Holds [A, N, N]; autograd gives the gradient."""
    dtype = torch.promote_types(
        torch.promote_types(student_TD.dtype, teacher_TD.dtype), torch.float32
    )
    bounds = cu_seqlens.tolist()
    num_tokens = bounds[-1]
    segment_N = torch.zeros(num_tokens, dtype=torch.long, device=student_TD.device)
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        segment_N[start:stop] = number
    same_segment_NN = segment_N[:, None] == segment_N[None, :]

    def split(vectors_TD: torch.Tensor) -> torch.Tensor:
        heads_NAD: torch.Tensor = vectors_TD[:num_tokens].to(dtype).unflatten(1, (num_heads, -1))
        return heads_NAD.transpose(0, 1)

    def log_relation(queries_TD: torch.Tensor, keys_TD: torch.Tensor | None) -> torch.Tensor:
        queries_AND = split(queries_TD)
        keys_AND = queries_AND if keys_TD is None else split(keys_TD)
        scores_ANN = queries_AND @ keys_AND.transpose(1, 2) * queries_AND.shape[-1] ** -0.5
        # The lowest finite number, not -inf: its probability is 0 and 0 * (-inf) would be NaN.
        lowest = torch.finfo(dtype).min
        masked_ANN: torch.Tensor = scores_ANN.masked_fill(~same_segment_NN, lowest)
        return masked_ANN.log_softmax(dim=-1)

    log_s_ANN = log_relation(student_TD, student_keys_TD)
    log_t_ANN = log_relation(teacher_TD, teacher_keys_TD)
    kl_ANN = log_t_ANN.exp() * (log_t_ANN - log_s_ANN)
    loss: torch.Tensor = kl_ANN.sum() / (num_heads * num_tokens)
    return loss
