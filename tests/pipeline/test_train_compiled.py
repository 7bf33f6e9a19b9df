"""A run with compiled layers trains as one without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.launch import fork, run, training

PLAIN = [
    "--student.hidden_dropout_prob=0",
    "--student.attention_probs_dropout_prob=0",
    "--teacher.dtype=float32",
    "--train.max_steps=6",
    "--train.save_every=3",
]


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(tiny: list[str], tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        arguments = [*tiny, *PLAIN, f"--output_dir={tmp_path / compiled}"]
        outcome = run([*arguments, f"--train.compile={compiled}"], stage="zero2_fp32", begin=fork)
        assert outcome.status == 0, outcome.output
        losses[compiled] = [line["loss"] for line in training(tmp_path / compiled)]
    assert len(losses["true"]) == 6
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
    assert losses["true"] != losses["false"]  # something was compiled
