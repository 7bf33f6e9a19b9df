"""Attention over packed segments, as transformers' attention functions are called."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

PACKED = "packed_segments"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    bounds: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Every token attends to its own segment only, exactly as if segments came one at a time.

    Args:
        module: the attention layer; unused.
        query: [1, heads, T, d].
        key: [1, heads, T, d].
        value: [1, heads, T, d].
        attention_mask: None; segments are the mask.
        bounds: segment boundaries on the host, from 0 to T.
        scaling: of the scores; None is 1/sqrt(d).
        dropout: of the attention weights.
        unused: whatever else transformers passes on.

    Returns:
        [1, T, heads, d], and no weights.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        for q, k, v in zip(
            query.split(lengths, dim=2),
            key.split(lengths, dim=2),
            value.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
