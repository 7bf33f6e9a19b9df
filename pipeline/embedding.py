"""The word embedding's gradient, gathered over an optimizer step.

Nine tenths of a small multilingual student are word embeddings, of which a micro-batch sees few
rows. torch makes a gradient of all rows in every backward pass, and DeepSpeed widens, adds and
sends all of it each time. Here a backward pass only keeps the rows that it saw, and the last one of
the step makes the whole from them.

A row's sum over a micro-batch is rounded to the weight's precision, as every other gradient is. The
sum of those over the step is handed on in the weight's `grad_dtype`: with fp32 it is exact as a
rule, so that a step is the same for any split over ranks. The engine asks for this under ZeRO 1
and 2; under ZeRO 3 every micro-batch counts as the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class StepEmbedding(nn.Module):
    """As the torch.nn.Embedding whose weight it takes, with one gradient an optimizer step.

    Args:
        embedding: what it stands for; its weight keeps its name.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.num_rows = embedding.num_embeddings  # ZeRO-3 empties the weight between its uses
        self.padding_idx = embedding.padding_idx
        self.is_last: Callable[[], bool] = lambda: True  # whether this micro-batch ends the step
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 to [..., width]."""
        # DeepSpeed takes every backward pass that reaches the weight for one with its gradient.
        weight = self.weight if self.is_last() else self.weight.detach()
        anchor = torch.zeros((), requires_grad=self.weight.requires_grad)
        vectors: torch.Tensor = _Lookup.apply(weight, anchor, ids, self)  # type: ignore[no-untyped-call]
        return vectors

    def keep(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """Remember a backward pass's part of the step's gradient."""
        self._kept.append(_sum_by_row(ids.flatten(), gradient.flatten(0, -2)))

    def collect(self) -> torch.Tensor:
        """The gradient of the whole weight from what was kept, which is forgotten."""
        ids, sums = self._kept[0]
        whole = torch.zeros(self.num_rows, sums.shape[1], device=sums.device)
        for ids, sums in self._kept:
            whole.index_add_(0, ids, sums.float())
        self._kept.clear()
        if self.padding_idx is not None:
            whole[self.padding_idx] = 0
        return whole.to(self.weight.grad_dtype)


def _sum_by_row(ids: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [T, width] of T ids as one row for each id that occurs, padded with zeros to T.

    As torch.unique would give, but of a length that the host knows without waiting for a GPU.
    """
    ordered, order = ids.sort()
    group = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    place = torch.empty_like(group).scatter_(0, order, group)
    sums = torch.ops.aten.embedding_dense_backward(gradients.float(), place, len(ids), -1, False)
    return torch.zeros_like(ids).scatter_(0, group, ordered), sums.to(gradients.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        anchor: torch.Tensor,
        ids: torch.Tensor,
        embedding: StepEmbedding,
    ) -> torch.Tensor:
        ctx.ids, ctx.embedding = ids, embedding
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.embedding.keep(ctx.ids, gradient)
        collected = ctx.embedding.collect() if ctx.needs_input_grad[0] else None
        return collected, None, None, None
