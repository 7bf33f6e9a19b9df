"""Matrix products of a step: what the models multiply, counted from their modules.

A multiplication and an addition count as two. What stands between the products is not counted, and
a backward pass counts as twice its forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from pipeline.models import CutEncoder, Encoder, MaskedLM, WholeEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large an encoder is, as far as it is run.

    Args:
        parameters: all that it holds.
        words: those of its word embeddings, where only a lookup reads them; else 0.
        layers: that are run whole; of a cut encoder one less than it has.
        width: of its hidden states.
        inner_width: of the widest product in a layer: what the feed-forward computes, its gate too.
        heads: of its attention.
        vocabulary: tokens that it knows.
        token_weights: weights of linear layers that every token is multiplied with.
        mask_weights: those that masked tokens alone are: the head of masked language modelling.
        predicts: whether it has that head.
    """

    parameters: int
    words: int
    layers: int
    width: int
    inner_width: int
    heads: int
    vocabulary: int
    token_weights: int
    mask_weights: int
    predicts: bool

    def forward_flops(self, lengths: Sequence[int], mask_probability: float = 0.0) -> float:
        """Of a forward pass over segments of these lengths, in tokens."""
        tokens = float(sum(lengths))
        linear = 2 * tokens * (self.token_weights + mask_probability * self.mask_weights)
        return linear + 4.0 * _squares(lengths) * self.layers * self.width


def size_of(encoder: Encoder) -> Size:
    """The size of an encoder; on the meta device it costs no memory to ask."""
    config = encoder.model.config
    predicts = isinstance(encoder, MaskedLM)
    head = encoder.architecture.mlm_head if predicts else ()
    in_head = sum(_linear_weights(getattr(encoder.model, name)) for name in head)
    width = int(config.hidden_size)
    projected_again = 3 * width**2 if isinstance(encoder, WholeEncoder) else 0
    words = encoder.word_embeddings
    linear = [m for layer in encoder.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    return Size(
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        words=0 if words is None else words.weight.numel(),
        layers=len(encoder.layers) - isinstance(encoder, CutEncoder),
        width=width,
        inner_width=max(module.out_features for module in linear),
        heads=int(config.num_attention_heads),
        vocabulary=int(config.vocab_size),
        token_weights=_linear_weights(encoder) - in_head + projected_again,
        mask_weights=in_head,
        predicts=predicts,
    )


def step_flops(
    teacher: Size, students: Sequence[Size], lengths: Sequence[int], mask_probability: float = 0.0
) -> float:
    """Of the teacher's forward and the students' forward and backward passes, without the loss."""
    passes = [teacher.forward_flops(lengths, mask_probability)]
    passes += [3 * student.forward_flops(lengths, mask_probability) for student in students]
    return sum(passes)


def relation_flops(
    teacher: Size, student: Size, lengths: Sequence[int], relations: int = 3
) -> float:
    """Of a relation loss: the scores of both models, and the student's gradient."""
    return relations * 2 * _squares(lengths) * (teacher.width + 3 * student.width)


def _squares(lengths: Sequence[int]) -> float:
    return float(np.square(np.asarray(lengths, dtype=np.float64)).sum())


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
