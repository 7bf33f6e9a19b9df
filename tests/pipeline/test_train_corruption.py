"""A bit that flips on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.launch import fork, metrics
from tests.pipeline.test_train_resume import student_bytes

FAULTY = "tests/pipeline/faulty_train.py"


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_before_it_is_saved(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "flip 1 6")
    with fork([*tiny, "--watch.check_corruption_every=4"], ranks=2, program=FAULTY) as running:
        outcome = running.wait()
    assert outcome.status == 1, outcome.output
    (line,) = outcome.errors
    assert "step 8: the teacher's weights differ" in line
    assert "rank 0 (" in line
    assert "rank 1 (" in line
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_check_changes_nothing(stage: str, tiny: list[str], straight, tmp_path: Path) -> None:
    every_step = [*tiny, "--watch.check_corruption_every=1"]
    with fork(every_step, ranks=2, stage=stage) as running:
        outcome = running.wait()
    assert outcome.status == 0, outcome.output
    assert student_bytes(tmp_path / "run") == student_bytes(straight(stage, 2))
    assert metrics(tmp_path / "run") == metrics(straight(stage, 2))
