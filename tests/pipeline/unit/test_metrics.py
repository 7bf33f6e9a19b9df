from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.metrics import METRICS, JsonLines, Metrics, read_lines


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, **values}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of steps 1 to 4, as a run would leave it."""
    path = tmp_path / METRICS
    lines = JsonLines(path, resume_step=0)
    for step in range(1, 5):
        lines.write(line(step, loss=step / 10))
    lines.close()
    return path


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_lines(path)]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / METRICS, resume_step=0)
    lines.write(line(1, loss=0.1, grad_norm=None))
    text = (tmp_path / "new" / METRICS).read_text()
    assert json.loads(text) == {"step": 1, "loss": 0.1, "grad_norm": None}
    assert text.endswith("\n")
    lines.sync()
    lines.close()


@pytest.mark.parametrize(
    ("resume_step", "kept"),
    [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])],
)
def test_a_resume_removes_what_will_be_made_again(
    resume_step: int, kept: list[int], path: Path
) -> None:
    before = path.read_text()
    lines = JsonLines(path, resume_step=resume_step)
    assert steps(path) == kept
    assert before.startswith(path.read_text())  # the rest to the byte
    lines.write(line(99))
    lines.close()
    assert steps(path) == [*kept, 99]


def test_every_cut_at_any_byte_leaves_the_whole_lines(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    torn = tmp_path / "torn.jsonl"
    for length in range(len(whole) + 1):
        torn.write_bytes(whole[:length])
        lines = JsonLines(torn, resume_step=4)
        lines.write(line(99))
        lines.close()
        num_whole = whole[:length].count(b"\n")
        kept = list(range(1, num_whole + 1))
        # A line may be whole but for its end.
        assert steps(torn) in ([*kept, 99], [*kept, num_whole + 1, 99])
        assert all(json.loads(raw) for raw in torn.read_text().splitlines())


@pytest.mark.parametrize("tail", [b"\x00" * 50, b"\xff\xfe", b"{", b'{"step": 5, "lo'])
def test_a_torn_end_is_left_out(tail: bytes, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert steps(path) == [1, 2, 3, 4]
    JsonLines(path, resume_step=9).close()
    assert path.read_bytes() == whole


def test_several_lines_of_a_step_stay_together(path: Path) -> None:
    lines = JsonLines(path, resume_step=4)
    lines.write(line(4, heldout_loss=1.0))
    lines.close()
    JsonLines(path, resume_step=4).close()
    assert steps(path) == [1, 2, 3, 4, 4]
    JsonLines(path, resume_step=3).close()
    assert steps(path) == [1, 2, 3]


def test_numbers_survive_to_the_bit(path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 2**53 + 1]
    lines = JsonLines(path, resume_step=0)
    lines.write(line(1, values=values))
    lines.close()
    JsonLines(path, resume_step=1).close()
    assert read_lines(path)[0]["values"] == values


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / METRICS) == []


def read_events(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_metrics_go_to_both_places(tmp_path: Path) -> None:
    with Metrics(tmp_path, resume_step=0) as metrics:
        metrics.write(1, {"loss": 0.5, "grad_norm": None})
        metrics.write(2, {"loss": 0.25, "grad_norm": 2.0})
        metrics.sync()
    assert read_lines(tmp_path / METRICS) == [
        {"step": 1, "loss": 0.5, "grad_norm": None},
        {"step": 2, "loss": 0.25, "grad_norm": 2.0},
    ]
    assert read_events(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]
    assert read_events(tmp_path, "grad_norm") == [(2, 2.0)]


def test_a_resume_takes_back_both(tmp_path: Path) -> None:
    with Metrics(tmp_path, resume_step=0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, {"loss": float(step)})
    with Metrics(tmp_path, resume_step=1) as metrics:
        metrics.write(2, {"loss": 20.0})
    assert [entry["loss"] for entry in read_lines(tmp_path / METRICS)] == [1.0, 20.0]
    assert read_events(tmp_path, "loss") == [(1, 1.0), (2, 20.0)]
