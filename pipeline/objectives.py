"""Objectives: pure functions of the student's and the teacher's vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.profiler import record_function

from pipeline.config import Objective
from pipeline.relation_kl import relation_kl


class QKV(NamedTuple):
    """Queries, keys and values of one layer before they are split into heads, each [T, width]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@record_function("loss")
def minilmv2(
    student: QKV, teacher: QKV, cu_seqlens: torch.Tensor, objective: Objective
) -> dict[str, torch.Tensor]:
    """MiniLMv2's relation losses (arXiv 2012.15828, equation 5).

    Args:
        student: of its last layer, with gradient.
        teacher: of the chosen layer.
        cu_seqlens: [segments + 1] segment boundaries.
        objective: relation heads, and the relations' weights.

    Returns:
        Each relation's mean KL in nats, unweighted; fp32 scalars.
    """
    return {
        name: relation_kl(
            getattr(student, name[0]),
            getattr(teacher, name[0]),
            cu_seqlens,
            objective.num_relation_heads,
            implementation=objective.relation_kl,
        )
        for name in active_relations(objective)
    }


def active_relations(objective: Objective) -> list[str]:
    """The relations with a weight above 0, in a fixed order."""
    return [name for name in sorted(objective.relations) if objective.relations[name] > 0]


def total(losses: dict[str, torch.Tensor], objective: Objective) -> torch.Tensor:
    """The weighted sum of the relations' losses: what is minimised."""
    return torch.stack([objective.relations[name] * loss for name, loss in losses.items()]).sum()
