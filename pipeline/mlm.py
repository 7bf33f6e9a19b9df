"""Encoders that are not cut: to their last hidden state, and on to the masked tokens' logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.dropout import replace_dropout
from pipeline.embedding import StepEmbedding
from pipeline.objectives import QKV, Outputs, Predictions

HEADS = ("cls", "lm_head")  # what transformers calls the head of masked language modelling


class WholeEncoder(nn.Module):
    """An encoder up to its last hidden state, over packed segments; the pooler is taken out.

    Args:
        model: a transformers encoder built like BERT (`embeddings`, `encoder.layer[i]`).
        first_position: the position id of a segment's first token.
    """

    def __init__(self, model: Any, first_position: int) -> None:
        super().__init__()
        embeddings = model.embeddings
        embeddings.word_embeddings = StepEmbedding(embeddings.word_embeddings)
        self.first_position = first_position
        model.pooler = None
        replace_dropout(model)
        self.model = model

    @property
    def word_embeddings(self) -> StepEmbedding:
        """The embedding of token ids."""
        embedding: StepEmbedding = self.model.embeddings.word_embeddings
        return embedding

    @property
    def whole_layers(self) -> list[Any]:
        """All layers."""
        return list(self.model.encoder.layer)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> Outputs:
        """The last layer's output, and its queries, keys and values.

        These are projected once more than the layer itself does, a quarter of its products.

        Args:
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.
        """
        before, after = self._states(input_ids, positions, cu_seqlens, max_seqlen)
        attention = self.whole_layers[-1].attention.self
        projections = (attention.query, attention.key, attention.value)
        return Outputs(after, QKV(*(projection(before) for projection in projections)))

    def last_hidden_state(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """The last layer's output alone, [T, d]."""
        return self._states(input_ids, positions, cu_seqlens, max_seqlen)[-1]

    def _states(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's input and output, each [T, d]."""
        hidden = self.model.embeddings(
            input_ids=input_ids, position_ids=positions + self.first_position
        )
        before = hidden
        for layer in self.whole_layers:
            before = hidden
            hidden = layer(
                hidden, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
        return before.squeeze(0), hidden.squeeze(0)

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Parameters under the names that the full model gives them."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters()}


class MaskedLM(nn.Module):
    """An encoder with its head of masked language modelling, over packed segments.

    Args:
        model: a transformers model `...ForMaskedLM`.
        first_position: the position id of a segment's first token.
    """

    word_embeddings = None  # shared with the head, whose gradient is of all rows in every pass

    def __init__(self, model: Any, first_position: int) -> None:
        super().__init__()
        # Not registered as a module: its parameters are the model's, and keep the model's names.
        self._encoder = (WholeEncoder(model.base_model, first_position),)
        self._head_name = next(name for name in HEADS if hasattr(model, name))
        # Behind the encoder, so that a weight that both share goes by the embedding's name.
        head = getattr(model, self._head_name)
        delattr(model, self._head_name)
        setattr(model, self._head_name, head)
        replace_dropout(model)
        self.model = model

    @property
    def whole_layers(self) -> list[Any]:
        """All layers."""
        return self._encoder[0].whole_layers

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        places: torch.Tensor,
    ) -> Predictions:
        """The last hidden states, and the logits where a prediction is asked for.

        Args:
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.
            places: [M] int64, which of the T tokens.
        """
        hidden = self._encoder[0].last_hidden_state(input_ids, positions, cu_seqlens, max_seqlen)
        head = getattr(self.model, self._head_name)
        return Predictions(hidden, head(hidden[places]))

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Parameters under the names that the full model gives them."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters()}
