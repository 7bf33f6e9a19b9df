"""A loss that leaps: what is said, and that leaving it out is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.pipeline.launch import Outcome, fork, metrics, training
from tests.pipeline.test_train_resume import student_bytes

FAULTY = "tests/pipeline/faulty_train.py"
SPIKE = 6
WINDOW = ["--watch.loss_spike_window=4", "--train.save_every=1", "--train.keep_checkpoints=20"]


def run(arguments: list[str], stage: str) -> Outcome:
    with fork(arguments, ranks=2, stage=stage, program=FAULTY) as running:
        outcome = running.wait()
    assert outcome.status == 0, outcome.output
    return outcome


def warnings(outcome: Outcome) -> list[str]:
    return [line for line in outcome.output.splitlines() if "the loss leaps" in line]


def optimizer_tensors(run_dir: Path, step: int) -> list[torch.Tensor]:
    """Master weights and moments of all ranks."""
    found = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                collect(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                collect(one)

    for path in sorted((run_dir / "checkpoints" / f"step-{step:08d}").glob("*optim_states.pt")):
        collect(torch.load(path, weights_only=False)["optimizer_state_dict"])
    return found


def until(whole: Path, step: int, copy: Path) -> Path:
    """The run as it was when a step had been saved."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "student")
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero2_fp32"])
def test_a_leap_is_left_out_as_if_the_step_only_counted(
    stage: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", f"leap 1 {SPIKE}")
    whole = tmp_path / "run"
    skip = [*tiny, *WINDOW, "--watch.on_loss_spike=skip"]
    (line,) = warnings(run(skip, stage))
    assert f"step {SPIKE}:" in line
    assert "is left out" in line
    assert line.endswith(f"look at its rows {rows_in_order(whole, SPIKE)}")
    before, after = optimizer_tensors(whole, SPIKE - 1), optimizer_tensors(whole, SPIKE)
    assert len(before) == len(after) >= 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    later = optimizer_tensors(whole, SPIKE + 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, later, strict=True))
    norms = {entry["step"]: entry["grad_norm"] for entry in training(whole)}
    assert [step for step, norm in norms.items() if norm is None] == [SPIKE]
    # A start from the step before decides the same; one from the step itself has no gradient left.
    for begun_after in (SPIKE - 1, SPIKE) if stage == "zero2" else (SPIKE,):
        again = until(whole, begun_after, tmp_path / f"from {begun_after}")
        run([*skip, f"--output_dir={again}"], stage)
        assert student_bytes(again) == student_bytes(whole)
        assert metrics(again) == metrics(whole)


def rows_in_order(run_dir: Path, step: int) -> list[int]:
    """Of a step, as the ranks share them: each a slice of it."""
    lines = [
        entry["rows"]
        for path in sorted((run_dir / "rows").glob("rank-*.jsonl"))
        for entry in map(json.loads, path.read_text().splitlines())
        if entry["step"] == step
    ]
    return [row for rows in lines for row in rows]


@pytest.mark.slow
def test_a_leap_is_warned_of_and_trained_on_by_default(
    tiny: list[str], straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", f"leap 1 {SPIKE}")  # of the losses told, not of the gradient
    (line,) = warnings(run([*tiny, *WINDOW], "zero2"))
    assert f"step {SPIKE}:" in line
    assert "is made" in line
    assert student_bytes(tmp_path / "run") == student_bytes(straight("zero2", 2))
