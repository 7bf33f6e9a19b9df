"""How far a format is from the student in PyTorch, measured on real text."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.checkpoint import State, shards_digest_of
from pipeline.config import ROOT, Recipe
from pipeline.export_formats.onnx_files import Arrays
from pipeline.loader import Batch, Loader, open_shards
from pipeline.models import Target, load_teacher, load_tokenizer, read_config
from pipeline.objectives import QKV, Outputs, Predictions, build_objective
from pipeline.topology import Topology

MEASURED_TOKENS = 20_000
BATCH = 8  # segments of a forward pass; padding and its mask are part of what is compared
DEMO_TEXT = ROOT / "recipes" / "demo_text"
DEMO_DOCUMENTS = 4  # of each language

Run = Callable[[Arrays], Arrays]
LastLayerRun = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Text:
    """What is compared on.

    Args:
        segments: the student's ids of each, special ones included.
        source: where they are from, in words.
    """

    segments: list[list[int]]
    source: str


def demo_text(tokenizer: Any, max_tokens: int) -> Text:
    """The first documents of each language that comes with this project, cut to `max_tokens`."""
    lines = [
        line
        for path in sorted(DEMO_TEXT.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()[:DEMO_DOCUMENTS]
    ]
    texts = [json.loads(line)["text"] for line in lines]
    ids = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return Text(ids, f"{len(texts)} documents of recipes/demo_text, in 15 languages")


class Heldout:
    """Held-out rows of a run's shards, the same number of each language.

    Args:
        recipe: of the run.
        state: says which generation of the shards the run read.
        folder: of the student, with its tokenizer and configuration.

    Raises:
        ConfigError: the shards or the teacher are not there.
        RunError: the shards are damaged.
    """

    def __init__(self, recipe: Recipe, state: State, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder
        reader = open_shards(recipe, shards_digest_of(state, []))
        alone = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1)
        loader = Loader(reader, alone, batch_size=1, micro=1, seed=recipe.seed)
        languages = [name for name, rows in reader.manifest.heldout_rows.items() if rows]
        rows = max(1, MEASURED_TOKENS // (reader.manifest.seq_len * max(1, len(languages))))
        self._batches = [batch for name in languages for batch in loader.heldout(name)[:rows]]
        self._new_ids = _new_ids(recipe, folder, reader.manifest.vocab_size)

    @property
    def text(self) -> Text | None:
        """The rows' segments; None where the shards hold out none."""
        segments = [ids[0].tolist() for batch in self._batches for ids in self._split(batch)]
        source = f"{len(self._batches)} held-out rows of `{self._recipe.shards}`"
        return Text(segments, source) if segments else None

    def _split(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The student's ids of each segment, [1, tokens]."""
        ids = self._new_ids[batch.input_ids]
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
            yield ids[:, start:stop]

    def losses(self, students: dict[str, LastLayerRun]) -> dict[str, float]:
        """The objective's value on the rows, a mean over tokens, of each form of the student.

        Args:
            students: by name: from ids [1, T] to `models.LastLayer`'s outputs.

        Returns:
            By the same names; nothing for an objective of predictions, which no form but
            PyTorch's makes.
        """
        config = read_config("teacher.model", self._recipe.teacher.model)
        student_config = read_config("student", str(self._folder))
        objective = build_objective(self._recipe, config, student_config)
        if objective.needs is Predictions or not self._batches:
            return {}
        layer = self._recipe.teacher.layer or config.num_hidden_layers
        target = Target(objective.teacher_needs, layer)
        teacher = load_teacher(self._recipe, torch.device("cpu"), [target])
        sums = dict.fromkeys(students, 0.0)
        for batch in self._batches:
            wanted = teacher(batch)
            for name, last_layer in students.items():
                parts = [last_layer(ids) for ids in self._split(batch)]
                hidden, *vectors = (torch.cat(part) for part in zip(*parts, strict=True))
                qkv = QKV(*vectors)
                outputs = Outputs(hidden, qkv) if objective.needs is Outputs else qkv
                loss = objective.total(objective.losses(outputs, wanted, batch))
                sums[name] += float(loss) * batch.num_tokens
        tokens = sum(batch.num_tokens for batch in self._batches)
        return {name: total / tokens for name, total in sums.items()}


def _new_ids(recipe: Recipe, folder: Path, vocab_size: int) -> torch.Tensor:
    """[vocab_size] int64: the student's id of each id of the shards; the same where none went."""
    if recipe.student.vocabulary == "full":
        return torch.arange(vocab_size)
    whole, own = load_tokenizer(recipe.tokenizer), load_tokenizer(str(folder))
    tokens = whole.convert_ids_to_tokens(list(range(vocab_size)))
    return torch.tensor(own.convert_tokens_to_ids(tokens))


def compare(
    reference: Run, other: Run, segments: Sequence[list[int]], pad_id: int
) -> dict[str, int | float]:
    """How far one form of a model is from another.

    Args:
        reference: from padded inputs to outputs by name.
        other: likewise.
        segments: ids of each.
        pad_id: of the padding.

    Returns:
        `segments`, `tokens`, mean and lowest cosine and mean relative error |a - b| / |b| of what
        both give of a segment: the mean-pooled embedding of an encoder, the logits of a head; for
        heads also `same_answer_percent`, how often the largest logit is the same.
    """
    cosines, errors, same = [], [], []
    for start in range(0, len(segments), BATCH):
        inputs = padded(segments[start : start + BATCH], pad_id)
        mask = inputs["attention_mask"] == 1
        outputs = _answers(other(inputs), mask), _answers(reference(inputs), mask)
        for a, b in zip(*outputs, strict=True):
            size = float(np.linalg.norm(b))
            cosines.append(float((a * b).sum() / (np.linalg.norm(a) * size)))
            errors.append(float(np.linalg.norm(a - b) / size))
            same.extend(a.argmax(axis=1) == b.argmax(axis=1))
    found = {
        "segments": len(segments),
        "tokens": sum(map(len, segments)),
        "cosine_mean": float(np.mean(cosines)),
        "cosine_min": min(cosines),
        "relative_error": float(np.mean(errors)),
    }
    if "last_hidden_state" not in reference(inputs):
        found["same_answer_percent"] = float(100 * np.mean(same))
    return found


def padded(segments: Sequence[list[int]], pad_id: int) -> Arrays:
    """A batch of segments as a tokenizer gives it, [segments, longest] int64 each."""
    ids = np.full((len(segments), max(map(len, segments))), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, segment in enumerate(segments):
        ids[row, : len(segment)] = segment
        mask[row, : len(segment)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def mean_pooled(
    hidden: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """[batch, width] embeddings: the mean of last hidden states [batch, length, width] over text.

    Args:
        hidden: last hidden states.
        mask: [batch, length], false where there is padding.
    """
    sums = (hidden * mask[..., None]).sum(axis=1, dtype=np.float64)
    means: npt.NDArray[np.float64] = sums / mask.sum(axis=1, keepdims=True)
    return means


def _answers(outputs: Arrays, mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float64]]:
    """What is compared of each segment: [answers, what is chosen from] float64."""
    if "last_hidden_state" in outputs:
        return list(mean_pooled(outputs["last_hidden_state"], mask)[:, None])
    logits = {name: array.astype(np.float64) for name, array in outputs.items()}
    if "logits" not in logits:  # a first and a last token for each text
        both = np.stack([logits["start_logits"], logits["end_logits"]], axis=1)
        return [of_text[:, is_text] for of_text, is_text in zip(both, mask, strict=True)]
    if logits["logits"].ndim == 2:  # a label for each text
        return list(logits["logits"][:, None])
    return [of_text[is_text] for of_text, is_text in zip(logits["logits"], mask, strict=True)]
