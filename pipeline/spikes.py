"""Losses that leap: told by the median of the steps before, and left out of training if asked."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from pipeline.config import Watch

LEAST_SPREAD = 0.01  # of the median: below, a curve is smoother than any leap that matters


def is_spike(loss: float, recent: Sequence[float], watch: Watch) -> bool:
    """Whether a loss lies far over those of the steps before it.

    Far is loss_spike_mads times the median absolute deviation over the median (Leys et al. 2013,
    "Detecting outliers: Do not use standard deviation around the mean, use absolute deviation
    around the median"), in a window of which not even a third of spikes moves either by much.

    Args:
        loss: of a step, over all ranks.
        recent: losses of the steps before, spikes among them: if a loss stays high, that is no
            spike any more when half of the window has seen it.
        watch: gives threshold and window; nothing is a spike until the window is full.
    """
    if len(recent) < watch.loss_spike_window:
        return False
    median = statistics.median(recent)
    spread = statistics.median(abs(one - median) for one in recent)
    return loss > median + watch.loss_spike_mads * max(spread, LEAST_SPREAD * median)


def remember(loss: float, recent: Sequence[float], watch: Watch) -> list[float]:
    """The window after one more step."""
    return [*recent, loss][-watch.loss_spike_window :]


def warn_of_spike(
    where: str, loss: float, recent: Sequence[float], rows: Sequence[int], *, leaves_out: bool
) -> None:
    """One line on stderr.

    Args:
        where: run and step.
        loss: the step's.
        recent: the window before.
        rows: the step's.
        leaves_out: whether its update is left out.
    """
    update = "left out" if leaves_out else "made (watch.on_loss_spike=skip leaves it out)"
    print(
        f"warning: {where}: the loss leaps to {loss:.4g} from a median of "
        f"{statistics.median(recent):.4g}; its update is {update}; look at its rows {rows}",
        file=sys.stderr,
        flush=True,
    )
