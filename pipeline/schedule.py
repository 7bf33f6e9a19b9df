"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from pipeline.config import Train


def learning_rate(step: int, train: Train) -> float:
    """Linear warm-up from 0 to the peak, then linear decay towards 0 at max_steps.

    Args:
        step: 0-based optimizer step. The first one already moves, the last one still does.
        train: the recipe's schedule.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    return train.learning_rate * (train.max_steps - step) / (train.max_steps - train.warmup_steps)
