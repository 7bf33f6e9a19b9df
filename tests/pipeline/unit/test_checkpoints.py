from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_prep.command import ConfigError, RunError
from pipeline import checkpoints as command
from pipeline.checkpoint import LATEST, MARKER, STAGE_KEY, Checkpoints, State, tag_of
from pipeline.checkpoints import main
from pipeline.config import Recipe, plain
from pipeline.topology import Topology

STEPS = (2, 4, 6, 8, 10)


class FakeEngine:
    def snapshot(self, tag: str) -> dict[str, memoryview]:
        return {name: memoryview(f"{name} {tag}".encode() * 40) for name in ("a.pt", "b.pt")}


@pytest.fixture
def run(tmp_path: Path, one_rank: Topology, make_recipe: Callable[..., Recipe]) -> Path:
    """A run's folder with checkpoints at STEPS, of which its recipe keeps two and milestones."""
    folder = tmp_path / "run"
    made = Checkpoints(folder, one_rank, keep=len(STEPS))
    for step in STEPS:
        identity = {STAGE_KEY: 3, "seed": 1}
        made.save(FakeEngine(), State(step=step, tokens=7, world_size=4, identity=identity))
    made.finish()
    recipe = make_recipe(train={"keep_checkpoints": 2, "keep_every": 4})
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(recipe)))
    return folder


def of_step(run: Path, step: int) -> Path:
    return run / "checkpoints" / tag_of(step)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_list_has_a_line_for_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (of_step(run, 2) / MARKER).unlink()
    (of_step(run, 4) / "a.pt").write_bytes(b"short")
    (of_step(run, 6) / MARKER).write_text("{}")
    size = sum(file.stat().st_size for file in of_step(run, 10).iterdir())
    assert main([str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "step"
    assert [line.split()[0] for line in lines] == [str(step) for step in STEPS]
    conditions = ["torn", "damaged", "damaged", "whole", "whole, latest"]
    for line, condition in zip(lines, conditions, strict=True):
        assert line.endswith(f"  {condition}")
    saved = json.loads((of_step(run, 10) / MARKER).read_text())["saved"]
    assert lines[-1].split()[1:5] == [saved["at"], "4", "3", f"{size / 1e6:.1f}"]
    assert saved["seconds"] >= saved["seconds_in_loop"] >= 0


def test_a_checkpoint_of_an_older_version_is_listed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.checkpoint import _digest

    body = json.loads((of_step(run, 8) / MARKER).read_text())
    body = {"state": body["state"], "files": body["files"]}
    (of_step(run, 8) / MARKER).write_text(json.dumps({**body, "digest": _digest(body)}))
    assert main([str(run)]) == 0
    assert main([str(run), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[4].split()[:2] == ["8", "-"]


def test_everything_that_is_broken_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--verify"]) == 0
    assert "5 of 5 checkpoints are whole, 0 faults" in capsys.readouterr().out
    (of_step(run, 2) / MARKER).unlink()
    flip_a_byte(of_step(run, 4) / "a.pt")
    (of_step(run, 4) / "b.pt").unlink()
    flip_a_byte(of_step(run, 10) / MARKER)
    assert main([str(run), "--verify"]) == 1
    said = capsys.readouterr()
    faults = said.err.splitlines()
    assert [tag_of(step) in fault for step, fault in zip((4, 4, 10, 10), faults, strict=True)]
    assert "a.pt is not what was written" in faults[0]
    assert "b.pt is missing" in faults[1]
    assert MARKER in faults[2]
    assert LATEST in faults[3]
    assert "never finished" in said.out
    assert "2 of 5 checkpoints are whole, 4 faults" in said.out


def test_pruning_keeps_what_the_recipe_keeps(run: Path) -> None:
    assert main([str(run), "--prune"]) == 0
    assert steps(run) == [4, 8, 10]
    assert main([str(run), "--prune", "--keep", "1"]) == 0
    assert steps(run) == [4, 8, 10]
    assert main([str(run), "--verify"]) == 0


def test_what_is_damaged_keeps_nobodys_place(run: Path) -> None:
    flip_a_byte(of_step(run, 10) / "a.pt")
    (of_step(run, 8) / MARKER).unlink()
    assert main([str(run), "--prune", "--keep", "1"]) == 0
    assert steps(run) == [4, 6, 8, 10]


def test_a_run_that_is_training_is_left_alone(run: Path) -> None:
    with open(run / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is training"):
            main([str(run), "--prune"])
    assert steps(run) == list(STEPS)
    assert main([str(run), "--prune"]) == 0


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the converter was asked for; it stands in for DeepSpeed's."""
    asked: list[str] = []

    def convert(folder: Path, tag: str, destination: Path) -> None:
        asked.append(tag)
        shutil.rmtree(destination)
        shutil.copytree(folder / tag, destination / tag)

    monkeypatch.setattr(command, "convert_to_universal", convert)
    return asked


def test_one_is_converted_into_a_new_folder(
    run: Path, converted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "new" / "universal"
    assert main([str(run), "--convert", "6", "--to", str(destination)]) == 0
    assert converted == [tag_of(6)]
    assert capsys.readouterr().out.strip() == str(destination / tag_of(6))
    assert (destination / tag_of(6) / "a.pt").exists()
    assert [path.name for path in destination.parent.iterdir()] == ["universal"]
    with pytest.raises(ConfigError, match="in use"):
        main([str(run), "--convert", "6", "--to", str(destination)])
    flip_a_byte(of_step(run, 4) / "a.pt")
    with pytest.raises(RunError, match=r"step-00000004.*damaged"):
        main([str(run), "--convert", "4", "--to", str(tmp_path / "other")])
    assert converted == [tag_of(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "2"], "--keep 2 is of --prune only"),
        (["--prune", "--keep", "0"], "--keep 0 would leave nothing"),
        (["--convert", "4"], "go together"),
        (["--to", "x"], "go together"),
        (["--convert", "5", "--to", "x"], "--convert 5 .* known are 2, 4, 6, 8, 10"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(run), *options])
    assert steps(run) == list(STEPS)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the output_dir"):
        main([str(tmp_path)])
