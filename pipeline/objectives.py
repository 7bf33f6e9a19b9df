"""Objectives: what of the teacher the student imitates, as losses of both models' outputs.

An objective says what it `needs` of the models, refuses models that it cannot compare, and gives
its terms: each a mean over positions, of which a batch says beforehand how many it has. A step's
value is the mean over all of its positions, however they are split over micro-batches and ranks.
Equations, recipe keys and sources: docs/objectives.md.

T tokens, M of them masked; d_s and d_t the models' widths; V the vocabulary.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from data_prep.command import ConfigError
from pipeline.config import Recipe, divisors
from pipeline.loader import Batch, Count
from pipeline.progress import part
from pipeline.relation_kl import relation_kl


class QKV(NamedTuple):
    """Queries, keys and values of one layer before they are split into heads, each [T, d].

    A student's are None where no relation asks for them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Outputs(NamedTuple):
    """What a layer puts out, [T, d], and what it attends with."""

    hidden: torch.Tensor
    qkv: QKV


class Predictions(NamedTuple):
    """The last hidden states [T, d], and the logits of the masked tokens [M, V]."""

    hidden: torch.Tensor
    logits: torch.Tensor


Compared = QKV | Outputs | Predictions


def of_text(outputs: Compared, num_tokens: int) -> Compared:
    """The outputs of the first tokens: what a batch's shape was filled up with is left out."""
    if isinstance(outputs, QKV):
        return QKV(*(x if x is None else x[:num_tokens] for x in outputs))
    hidden = outputs.hidden[:num_tokens]
    if isinstance(outputs, Outputs):
        return Outputs(hidden, of_text(outputs.qkv, num_tokens))  # type: ignore[arg-type]
    return Predictions(hidden, outputs.logits)


class DistillationObjective(abc.ABC):
    """What training, evaluation and benchmarks need to know of an objective.

    Attributes:
        needs: the kind of outputs that it takes of the student.
        teacher_needs: and of the teacher.
        projections: letters of the last layer's projections that a student's gradient reaches.
        mask_probability: share of the tokens that are to be predicted; at 0 none is masked.
        weights: of the terms that count, in a fixed order.
    """

    needs: type[Compared]
    projections: str = "qkv"

    def __init__(self, recipe: Recipe) -> None:
        self.weights = recipe.objective.weights
        self.mask_probability = recipe.objective.masks

    @property
    def teacher_needs(self) -> type[Compared]:
        """The student's, where nothing else is said."""
        return self.needs

    @abc.abstractmethod
    def losses(self, student: Any, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """Each term's unweighted mean over the batch's positions; scalars in fp32.

        Args:
            student: of the kind `needs`, with gradient.
            teacher: of the kind `teacher_needs`, without; may be inference tensors.
            batch: that both models read.
        """

    def counts(self, count: Count) -> dict[str, int]:
        """How many of `count`'s positions each term is a mean over."""
        return dict.fromkeys(self.weights, count.tokens)

    def shares(self, part: Count, whole: Count) -> dict[str, float]:
        """What each term of a part counts in the whole's mean, from 0 to 1."""
        wholes = self.counts(whole)
        return {term: n / max(wholes[term], 1) for term, n in self.counts(part).items()}

    def total(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of the terms: what is minimised."""
        return torch.stack([self.weights[term] * loss for term, loss in losses.items()]).sum()


class _Relations(DistillationObjective):
    """KL between the two models' self-attention relations.

    Args:
        recipe: gives the weights and the implementation.
        num_heads: that the vectors of both models are split into.
        pairs: for each term, the letters of the vectors whose products are the scores: query side
            first.
    """

    def __init__(self, recipe: Recipe, num_heads: int, pairs: Mapping[str, str]) -> None:
        super().__init__(recipe)
        self._num_heads = num_heads
        self._implementation = recipe.objective.relation_kl
        self._pairs = {term: pairs.get(term, term) for term in self.weights}
        letters = "".join(self._pairs.values())
        self.needs = Outputs if "h" in letters else QKV
        if self.needs is QKV:  # an output depends on all three
            self.projections = "".join(letter for letter in "qkv" if letter in letters)

    @part("loss")
    def losses(
        self, student: QKV | Outputs, teacher: QKV | Outputs, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """See `DistillationObjective.losses`; every term is a mean over heads and tokens."""
        return {
            term: self._relation_kl(student, teacher, batch.cu_seqlens, *pair)
            for term, pair in self._pairs.items()
        }

    def _relation_kl(
        self,
        student: QKV | Outputs,
        teacher: QKV | Outputs,
        cu_seqlens: torch.Tensor,
        queries: str,
        keys: str,
    ) -> torch.Tensor:
        own_keys = queries != keys
        return relation_kl(
            _vectors(student, queries),
            _vectors(teacher, queries),
            cu_seqlens,
            self._num_heads,
            student_keys=_vectors(student, keys) if own_keys else None,
            teacher_keys=_vectors(teacher, keys) if own_keys else None,
            implementation=self._implementation,
        )


def _vectors(outputs: QKV | Outputs, letter: str) -> torch.Tensor:
    if isinstance(outputs, Outputs):
        return outputs.hidden if letter == "h" else _vectors(outputs.qkv, letter)
    vectors: torch.Tensor = getattr(outputs, letter)
    return vectors


class MiniLMv2(_Relations):
    """MiniLMv2 (arXiv 2012.15828, equations 5 to 8): relations of queries, keys and values.

    With h relation heads of both models' vectors, a term such as "qk" is the mean over heads and
    tokens of KL(softmax(Q_t K_t^T / sqrt(d_t/h)) || softmax(Q_s K_s^T / sqrt(d_s/h))) within each
    segment. "hh", of the layers' outputs, is not the paper's.

    Raises:
        ConfigError: the relation heads do not divide a width.
    """

    def __init__(self, recipe: Recipe, teacher_config: Any, student_config: Any) -> None:
        heads = recipe.objective.num_relation_heads
        widths = teacher_config.hidden_size, student_config.hidden_size
        for whose, width in zip(("teacher", "student"), widths, strict=True):
            if width % heads:
                raise ConfigError(
                    f"objective.num_relation_heads={heads} does not divide the {whose}'s hidden "
                    f"size {width}, so the last head would be cut short; use one of "
                    f"{divisors(math.gcd(*widths))}"
                )
        super().__init__(recipe, heads, pairs={})


class MiniLM(_Relations):
    """MiniLM (arXiv 2002.10957): attention distributions and value relations of one layer.

    "at" is the mean over attention heads and tokens of KL(A_t || A_s), where A = softmax(Q K^T /
    sqrt(d_k)) is what the layer itself attends with (equation 4); "vr" the same of
    softmax(V V^T / sqrt(d_k)) (equations 5 and 6). The paper adds both up unweighted (equation
    7). d_k is each model's own width of a head. "hh", of the layers' outputs, is not in the sum.

    Raises:
        ConfigError: the two models have different numbers of attention heads.
    """

    def __init__(self, recipe: Recipe, teacher_config: Any, student_config: Any) -> None:
        heads = teacher_config.num_attention_heads
        if student_config.num_attention_heads != heads:
            raise ConfigError(
                f"student.num_attention_heads={student_config.num_attention_heads} is not the "
                f"teacher's {heads}, and objective.name=minilm compares attention head by head; "
                f"use {heads}, or objective.name=minilmv2, whose relation heads are its own"
            )
        super().__init__(recipe, heads, pairs={"at": "qk", "vr": "vv"})


class DistilBERT(DistillationObjective):
    """DistilBERT (arXiv 1910.01108): soft targets, masked language modelling, hidden states.

    From the paper: the three losses, and a student that starts from every other layer of the
    teacher. From its released code: the weights 5, 2 and 1, the temperature 2 and its square as a
    factor, and that the cosine is taken at every token. Unlike that code, "ce" is taken where a
    token is masked alone (its option restrict_ce_to_mask), so that no other logits are computed,
    and every ordinary token is masked with the same probability, not rare ones more often.

    Raises:
        ConfigError: the two models have no vocabulary or width in common, or the teacher's layer
            is not its last.
    """

    needs = Predictions

    def __init__(self, recipe: Recipe, teacher_config: Any, student_config: Any) -> None:
        super().__init__(recipe)
        layer, last = recipe.teacher.layer, teacher_config.num_hidden_layers
        if layer not in (None, last):
            raise ConfigError(
                f"teacher.layer={layer} has no predictions, which objective.name=distilbert "
                f"imitates; use null or {last}, the last"
            )
        if recipe.student.vocabulary != "full":
            raise ConfigError(
                f"student.vocabulary={recipe.student.vocabulary} leaves tokens out that the "
                "teacher predicts, which objective.name=distilbert imitates; use full"
            )
        if student_config.vocab_size != teacher_config.vocab_size:
            raise ConfigError(
                f"the student predicts {student_config.vocab_size} ids and the teacher "
                f"{teacher_config.vocab_size}, so objective.name=distilbert cannot compare them; "
                "use a student of the teacher's vocabulary"
            )
        if "cos" in self.weights and student_config.hidden_size != teacher_config.hidden_size:
            raise ConfigError(
                f"student.hidden_size={student_config.hidden_size} is not the teacher's "
                f"{teacher_config.hidden_size}, so hidden states have no cosine; use "
                f"{teacher_config.hidden_size}, or weight 0 in objective.losses.cos"
            )
        self._temperature = recipe.objective.temperature

    @property
    def teacher_needs(self) -> type[Compared]:
        """Without "ce" nobody asks for the teacher's predictions, and it may lack a head."""
        return Predictions if "ce" in self.weights else Outputs

    def counts(self, count: Count) -> dict[str, int]:
        """Masked tokens, and all of them for the cosine."""
        return {term: count.tokens if term == "cos" else count.masked for term in self.weights}

    @part("loss")
    def losses(self, student: Predictions, teacher: Any, batch: Batch) -> dict[str, torch.Tensor]:
        """See `DistillationObjective.losses`; where nothing is masked "ce" and "mlm" are 0."""
        assert batch.masked is not None
        labels = batch.masked.labels
        terms = {
            "ce": lambda: soft_target_kl(student.logits, teacher.logits, self._temperature),
            "cos": lambda: cosine_distance(student.hidden, teacher.hidden),
            "mlm": lambda: mlm_loss(student.logits, labels),
        }
        return {term: terms[term]() for term in self.weights}


def soft_target_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The mean over positions of T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats.

    The gradient is that of the paper's cross-entropy with soft targets, whose value is larger by
    the teacher's entropy; T^2 keeps it of one size for any temperature T.

    Args:
        student: [M, V] logits.
        teacher: [M, V] logits, without gradient.
        temperature: T above 0.

    Returns:
        A scalar in fp32 (fp64 where an input is fp64); 0 where M is 0.
    """
    dtype = _at_least_fp32(student, teacher)
    log_s, log_t = (
        functional.log_softmax(logits.to(dtype) / temperature, dim=-1)
        for logits in (student, teacher)
    )
    kl = functional.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return temperature**2 * kl / max(len(student), 1)


def mlm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the tokens that stood where the masked ones are, in nats.

    Args:
        logits: [M, V].
        labels: [M] int64.

    Returns:
        A scalar in fp32 (fp64 for fp64); 0 where M is 0.
    """
    logits = logits.to(_at_least_fp32(logits))
    return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean over positions of 1 - cos(student, teacher).

    Args:
        student: [T, d].
        teacher: [T, d], without gradient.

    Returns:
        A scalar in fp32 (fp64 where an input is fp64), from 0 to 2.
    """
    dtype = _at_least_fp32(student, teacher)
    student, teacher = (functional.normalize(x.to(dtype), dim=-1) for x in (student, teacher))
    return 1 - (student * teacher).sum(-1).mean()


def _at_least_fp32(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


OBJECTIVES: dict[str, type[MiniLMv2] | type[MiniLM] | type[DistilBERT]] = {
    "minilmv2": MiniLMv2,
    "minilm": MiniLM,
    "distilbert": DistilBERT,
}


def build_objective(
    recipe: Recipe, teacher_config: Any, student_config: Any
) -> DistillationObjective:
    """The recipe's objective, for models of these transformers configurations.

    Raises:
        ConfigError: it cannot compare them.
    """
    return OBJECTIVES[recipe.objective.name](recipe, teacher_config, student_config)
