"""Ranks that keep the others waiting, found by the time of what no rank waits for another in."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import torch

from pipeline.collectives import all_sum

FEWEST_STEPS = 5  # whose mean says something; the first one of all builds kernels and caches


def seconds_of_ranks(
    seconds: float, rank: int, world_size: int, device: torch.device
) -> list[float]:
    """Every rank's own seconds, in rank order."""
    table = torch.zeros(world_size, dtype=torch.float64)
    table[rank] = seconds
    of_ranks: list[float] = all_sum(table.to(device)).tolist()
    return of_ranks


def slowest(seconds: Sequence[float]) -> tuple[int, float, float]:
    """The rank with the most seconds, these, and the median of the others' (its own if alone)."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = [one for other, one in enumerate(seconds) if other != rank]
    return rank, seconds[rank], statistics.median(others or seconds)


def warn_of_straggler(
    step: int, seconds: Sequence[float], hosts: Sequence[str], percent: float
) -> None:
    """One line on stderr where a rank needs that much longer than the median of the others.

    Args:
        step: steps done.
        seconds: each rank's own, of a step.
        hosts: the ranks'.
        percent: over the median, from which on it is said.
    """
    rank, most, median = slowest(seconds)
    if most > median * (1 + percent / 100):
        print(
            f"warning: step {step}: rank {rank} ({hosts[rank]}) reads and runs the teacher in "
            f"{most * 1e3:.0f} ms a step, the others in {median * 1e3:.0f} ms, so all wait for it; "
            "see what else that host does, its disk, and its GPU's clock and temperature",
            file=sys.stderr,
            flush=True,
        )
