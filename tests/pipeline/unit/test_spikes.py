from __future__ import annotations

import pytest

from pipeline.config import Watch
from pipeline.spikes import is_spike, remember

WATCH = Watch(loss_spike_window=5, loss_spike_mads=10.0)
RECENT = [1.0, 1.1, 0.9, 1.2, 0.8]  # median 1, deviations 0, .1, .1, .2, .2: their median .1


def test_far_is_counted_in_median_deviations() -> None:
    assert not is_spike(1.99, RECENT, WATCH)
    assert is_spike(2.01, RECENT, WATCH)
    assert not is_spike(0.0, RECENT, WATCH)


def test_a_smooth_curve_may_rise_a_little() -> None:
    """A tenth of the median here: ten times a hundredth."""
    assert not is_spike(2.19, [2.0] * 5, WATCH)
    assert is_spike(2.21, [2.0] * 5, WATCH)


def test_nothing_is_known_before_the_window_is_full() -> None:
    assert not is_spike(1e9, RECENT[:4], WATCH)


@pytest.mark.parametrize("level", [3.0, 30.0])
def test_a_loss_that_stays_high_is_new_ground_and_not_skipped_for_ever(level: float) -> None:
    recent, spikes = list(RECENT), 0
    for _ in range(20):
        spikes += is_spike(level, recent, WATCH)
        recent = remember(level, recent, WATCH)
    assert 0 < spikes <= 3
    assert recent == [level] * 5


def test_a_second_spike_is_seen_behind_the_first() -> None:
    recent = remember(50.0, RECENT, WATCH)
    assert len(recent) == 5
    assert is_spike(50.0, recent, WATCH)
