"""Who runs which cell, and what a cell's folder is named for."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from data_prep.command import RunError
from pipeline.evaluation.cells import Cell, claimed, run_cells
from pipeline.evaluation.data import TaskData
from pipeline.evaluation.fine_tuning import Source, Training
from pipeline.evaluation.layouts import Example
from pipeline.evaluation.tasks import TASKS


def make(
    root: Path, teacher: Path, *, seed: int = 1, digest: str = "d", rate: float = 1e-5
) -> Cell:
    rows = {"": [Example("0", ("a",), 1)]}
    data = TaskData(labels=("0", "1"), train=rows[""], dev=rows, test=rows, reported="dev",
                    sources=[], left_out={}, digest=digest)  # fmt: skip
    training = Training(learning_rate=rate, epochs=3, seed=seed)
    return Cell(source=Source(str(teacher), "--model"), name="run/a b", digest="m",
                task=TASKS["sst2"], data=data, training=training, root=root)  # fmt: skip


def test_a_folder_is_of_everything_that_the_result_follows_from(
    tmp_path: Path, pocket_teacher: Path
) -> None:
    first = make(tmp_path, pocket_teacher).folder
    assert first == make(tmp_path, pocket_teacher).folder
    others = [
        make(tmp_path, pocket_teacher, seed=2).folder,
        make(tmp_path, pocket_teacher, digest="e").folder,
        make(tmp_path, pocket_teacher, rate=2e-5).folder,
    ]
    assert len({first, *others}) == 4
    assert first.parent == tmp_path / "run-a-b" / "sst2"
    assert first.name.startswith("lr1e-05-epochs3-seed1-")


def test_cells_that_others_are_at_are_left_to_them(
    tmp_path: Path, pocket_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make(tmp_path, pocket_teacher, seed=seed) for seed in (1, 2, 3, 4)]
    ran: list[int] = []

    def run(cell: Cell) -> None:
        ran.append(cell.training.seed)
        (cell.folder / "result.json").write_text('{"dev": 0, "score": 0}')

    monkeypatch.setattr(Cell, "run", run)
    others = multiprocessing.get_context("fork")
    held, release = others.Event(), others.Event()
    other = others.Process(target=hold, args=(cells[1].folder, held, release))
    other.start()
    assert held.wait(60)
    said: list[str] = []
    left = run_cells(cells, 2, said.append)
    assert [cell.training.seed for cell in left] == [2]
    assert ran == [3, 4, 1]
    assert said[-1].startswith("[3/4] run/a b, sst2, lr1e-05-epochs3-seed1: accuracy 0.00")
    other.kill()  # what it held is free again
    other.join()
    assert run_cells(cells, 0, said.append) == []
    assert ran == [3, 4, 1, 2]


def hold(folder: Path, held: Any, release: Any) -> None:
    with claimed(folder) as is_ours:
        assert is_ours
        held.set()
        release.wait(600)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/cell cannot be written.*name another --output_dir"):
        with claimed(tmp_path / "file" / "cell"):
            pass
