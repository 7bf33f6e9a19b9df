"""Memory of a rank, counted from shapes: what is held between steps, and what a step adds.

The terms follow the code: models.py and objectives.py for the models, DeepSpeed 0.19.8 for its
optimizers' buffers. docs/scaling.md has what they give against what was measured.

T tokens of a micro-batch, N parameters of the student, V of them word embeddings, W ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.flops import Size
from pipeline.objectives import DistillationObjective, MiniLMv2

DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own, of elements
LOGIT_BYTES = 24  # of a masked token and word, at the peak: both models' logits, two losses in fp32
# What no tensor holds: CUDA's context and NCCL's buffers, assumed; a CPU's libraries, measured.
PROCESS_BYTES = {"cuda": 1.5e9, "cpu": 0.53e9}
FRAGMENTS = {"cuda": 0.05, "cpu": 0.0}  # share that an allocator cannot use; assumed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What of a DeepSpeed configuration takes memory or time.

    Args:
        stage: of ZeRO.
        element: bytes of a weight and of an activation: 2, or 4 in fp32.
        accumulated: bytes of an accumulated gradient's element.
        communicated: bytes of a gradient's element on the network.
        bucket: elements of a buffer for gradients.
        buffers: how many there are: two where communication overlaps.
    """

    stage: int
    element: int
    accumulated: int
    communicated: int
    bucket: int
    buffers: int

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> Policy:
        """Of a configuration as `merge_ds_config` returns it."""
        zero = ds_config["zero_optimization"]
        halves = any(ds_config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16"))
        element = 2 if halves else 4
        accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype")
        communicated = ds_config.get("communication_data_type")
        stage = int(zero["stage"])
        return cls(
            stage=stage,
            element=element,
            accumulated=4 if accumulated == "fp32" else element,
            communicated=4 if communicated == "fp32" else element,
            bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            buffers=2 if zero.get("overlap_comm", stage == 3) else 1,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A student as far as memory goes: its size, objective, policy and whether it drops out."""

    size: Size
    objective: DistillationObjective
    policy: Policy
    has_dropout: bool

    def held(self, ranks: int) -> dict[str, float]:
        """Bytes between steps, by what they are for."""
        policy, parameters = self.policy, self.size.parameters
        weights = policy.element * parameters
        gradients = 0.0
        if policy.stage == 1 and policy.element < policy.accumulated:
            gradients = 4.0 * parameters  # BF16_Optimizer keeps the sums of all
        elif policy.stage == 3:
            gradients = policy.accumulated * parameters / ranks
            gradients += policy.buffers * policy.element * policy.bucket
        return {
            "student weights": weights / ranks if policy.stage == 3 else weights,
            "fp32 weights": 4 * parameters / ranks,
            "AdamW": 8 * parameters / ranks,
            "gradients": gradients,
        }

    def forward(self, tokens: int, teacher: Size, teacher_element: int, device: str) -> float:
        """Bytes at the end of a forward pass, when all that the backward pass needs is there."""
        size, element = self.size, self.policy.element
        # A layer keeps for its backward pass: its input, Q, K, V, what attention puts out, and
        # inputs and outputs of the two layer norms; the feed-forward's before and after its GELU.
        elements = size.layers * (8 * size.width + 2 * size.inner_width) + 2 * size.width
        masks = 0.0
        if self.has_dropout and device == "cuda":  # elsewhere a hash makes them again
            masks = (2 * size.layers + 1) * size.width
        statistics = size.layers * (4 * size.heads + 16)  # of softmax and layer norms, in fp32
        vectors = 3 * size.width * element + 3 * teacher.width * teacher_element
        per_token = elements * element + masks + statistics + vectors
        return tokens * per_token + self._loss(tokens, teacher, device)

    def _loss(self, tokens: int, teacher: Size, device: str) -> float:
        size = self.size
        if size.predicts:
            return self.objective.mask_probability * tokens * size.vocabulary * LOGIT_BYTES
        gradients = 4 * size.width * len(self.objective.weights)
        if not isinstance(self.objective, MiniLMv2):
            gradients += 4 * size.width  # attention's, of queries and keys
        work = 3 * 4 * size.heads
        if device == "cpu":
            work = 4 * (size.width + teacher.width)  # the C kernel reads fp32
        return float(tokens * (gradients + work))

    def end_of_backward(self, ranks: int) -> float:
        """Bytes of gradients when the last of them, the word embeddings', is there."""
        policy, size = self.policy, self.size
        bucket = policy.bucket
        if policy.stage == 2 and size.words:
            bucket = min(bucket, size.words - 1)  # see engine.py
        words = policy.accumulated * size.words
        if policy.stage == 1:
            rest = policy.element * (size.parameters - size.words)
            return 2.0 * words + rest
        if policy.stage == 3:
            return words + policy.element * size.words + policy.communicated * bucket
        buffers = (policy.buffers * policy.element + policy.communicated) * bucket
        return words + buffers + self.sums(ranks)

    def sums(self, ranks: int) -> float:
        """Bytes of gradients that ZeRO 2 adds up over micro-batches, this rank's share."""
        if self.policy.stage != 2:
            return 0.0
        return self.policy.accumulated * self.size.parameters / ranks

    def update(self, ranks: int) -> float:
        """Bytes that an optimizer step adds: the norm is taken of a gradient in fp64."""
        share = self.size.parameters / ranks
        return self.sums(ranks) + 8 * min(max(self.size.words, self.size.width**2), share)

    def gathered(self, ranks: int) -> float:
        """Bytes of weights that ZeRO 3 has gathered, at most: all."""
        return self.policy.element * self.size.parameters if self.policy.stage == 3 else 0.0


def teacher_bytes(teacher: Size, dtype: str) -> float:
    """Bytes of the teacher's weights."""
    if dtype == "float8":  # products in the layers before the last are in 8 bits
        return 2.0 * teacher.parameters - teacher.token_weights
    return float(ELEMENTS[dtype] * teacher.parameters)


ELEMENTS = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 2}


def footprint(
    students: Sequence[Trained],
    teacher: Size,
    *,
    teacher_dtype: str,
    micro_batch_tokens: int,
    ranks: int,
    device: str,
) -> dict[str, float]:
    """Bytes of a rank at its fullest moment, by what they are for.

    Args:
        students: that learn from one pass of the teacher, one after the other.
        teacher: up to the layer that is used.
        teacher_dtype: of the recipe.
        micro_batch_tokens: of a rank's forward pass.
        ranks: W.
        device: "cuda" or "cpu".
    """
    parts = {"teacher": teacher_bytes(teacher, teacher_dtype)}
    for student in students:
        for name, size in student.held(ranks).items():
            parts[name] = parts.get(name, 0.0) + size
    element = ELEMENTS[teacher_dtype]
    tokens = micro_batch_tokens
    sums = sum(student.sums(ranks) for student in students)  # wait for the others' passes
    moments = {
        "teacher's pass": sums + tokens * element * (teacher.width + 2 * teacher.inner_width)
    }
    for student in students:
        others = sums - student.sums(ranks)
        forward = student.forward(tokens, teacher, element, device)
        targets = 3 * tokens * teacher.width * element
        for name, size in (
            ("activations", sums + forward + student.gathered(ranks)),
            ("last gradients", others + targets + student.end_of_backward(ranks)),
            ("optimizer step", others + student.update(ranks)),
        ):
            moments[name] = max(moments.get(name, 0.0), size)
    fullest = max(moments, key=lambda name: moments[name])
    parts[f"a step's peak: {fullest}"] = moments[fullest]
    parts["process and fragments"] = PROCESS_BYTES[device] + FRAGMENTS[device] * sum(parts.values())
    return parts
