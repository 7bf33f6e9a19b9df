"""A straightforward distillation loop to compare with, in the style of public code.

One paragraph is one sample, padded to the longest of its micro-batch. The whole teacher runs, both
models are asked for all hidden states and attentions, and the relations are dense. Transformers'
eager attention is the one that can return attentions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from benchmarks.dense import dense_relation_kl
from pipeline.config import Recipe
from pipeline.models import build_student, read_config, student_config


class PaddedLoop:
    """The recipe's teacher, student, loss and optimizer, without this project's code.

    Args:
        recipe: gives the models, the student's first weights, the loss and AdamW's values.
        dtype: bfloat16 is the teacher's weights in it and both models under autocast; float32 is
            neither.
        device: that both models are on.
        sequences: paragraphs of a micro-batch.
    """

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype, device: torch.device, *, sequences: int
    ) -> None:
        self._recipe, self._device, self._sequences = recipe, device, sequences
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
        source = recipe.teacher.model
        self.teacher = AutoModel.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", add_pooling_layer=False
        ).to(device)
        config = student_config(recipe.student, read_config("teacher.model", source))
        start = build_student(recipe.student, config, recipe.seed).state_dict()
        self.student = AutoModel.from_config(config, attn_implementation="eager")
        self.student.load_state_dict(start)
        self.student.to(device).train()
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=recipe.train.learning_rate,
            betas=recipe.train.adam_betas,
            eps=recipe.train.adam_eps,
            weight_decay=recipe.train.weight_decay,
        )

    def micro_batches(
        self, texts: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and mask, both [paragraphs, longest], of each micro-batch."""
        pad_id = self.student.config.pad_token_id
        padded = []
        for first in range(0, len(texts), self._sequences):
            some = list(texts[first : first + self._sequences])
            ids = pad_sequence(some, batch_first=True, padding_value=pad_id)
            padded.append((ids, (ids != pad_id).long()))
        return padded

    def step(self, texts: Sequence[torch.Tensor]) -> None:
        """One optimizer step over the paragraphs."""
        num_tokens = sum(len(text) for text in texts)
        for ids, mask in self.micro_batches(texts):
            loss = self._loss(ids.to(self._device), mask.to(self._device))
            (loss * (int(mask.sum()) / num_tokens)).backward()
        parameters = self.student.parameters()
        torch.nn.utils.clip_grad_norm_(parameters, self._recipe.train.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, texts: Sequence[torch.Tensor]) -> float:
        """The mean over the paragraphs' tokens, without dropout."""
        self.student.eval()
        sums = [
            float(self._loss(ids.to(self._device), mask.to(self._device))) * int(mask.sum())
            for ids, mask in self.micro_batches(texts)
        ]
        self.student.train()
        return sum(sums) / sum(len(text) for text in texts)

    def _loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "output_hidden_states": True,
            "output_attentions": True,
        }
        layer = self._recipe.teacher.layer or self.teacher.config.num_hidden_layers
        with self._autocast:
            with torch.no_grad():
                targets = self._projections(self.teacher, self.teacher(**inputs), layer)
            outputs = self.student(**inputs)
            layer = self.student.config.num_hidden_layers
            vectors = self._projections(self.student, outputs, layer)
        objective = self._recipe.objective
        losses = [
            weight
            * dense_relation_kl(
                vectors[name[0]], targets[name[0]], mask, objective.num_relation_heads
            )
            for name, weight in objective.relations.items()
        ]
        return torch.stack(losses).sum()

    @staticmethod
    def _projections(
        model: torch.nn.Module, outputs: object, layer: int
    ) -> dict[str, torch.Tensor]:
        """Queries, keys and values of a 1-based layer, from the hidden states that enter it."""
        attention = model.encoder.layer[layer - 1].attention.self
        hidden = outputs.hidden_states[layer - 1]
        return {
            "q": attention.query(hidden),
            "k": attention.key(hidden),
            "v": attention.value(hidden),
        }
