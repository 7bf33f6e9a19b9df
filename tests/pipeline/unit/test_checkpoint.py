from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.command import ConfigError, RunError
from pipeline import checkpoint
from pipeline.checkpoint import (
    FREE_KEYS,
    LATEST,
    MARKER,
    STAGE_KEY,
    Checkpoints,
    State,
    check_identity,
    identity,
    is_foreign,
    newest_state,
    read_state,
    step_of,
    superseded,
    tag_of,
)
from pipeline.config import Recipe, Variant, flatten
from pipeline.topology import Topology

POLICY = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


class FakeEngine:
    """Has what an engine would write: a file of the model and one of the optimizer."""

    def snapshot(self, tag: str) -> dict[str, memoryview]:
        names = ("model.pt", "optimizer.pt")
        return {name: memoryview(f"{name} of {tag}".encode() * 100) for name in names}


def state_at(step: int) -> State:
    return State(step=step, tokens=step * 10, world_size=1, identity={"seed": 1})


@pytest.fixture
def checkpoints(tmp_path: Path, one_rank: Topology) -> Callable[..., Checkpoints]:
    """Saves steps into tmp_path/checkpoints."""

    def save(*steps: int, keep: int = 10, **options: int) -> Checkpoints:
        made = Checkpoints(tmp_path, one_rank, keep=keep, **options)
        for step in steps:
            made.save(FakeEngine(), state_at(step))
        made.finish()
        return made

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_a_checkpoint_is_what_was_saved(checkpoints, tmp_path: Path) -> None:
    made = checkpoints(3, 12)
    assert made.newest() == state_at(12)
    assert names(made.folder) == ["step-00000003", "step-00000012"]
    assert (made.folder / LATEST).read_text() == "step-00000012"
    assert read_state(made.folder / "step-00000003") == state_at(3)


def test_the_marker_describes_every_file(checkpoints) -> None:
    folder = checkpoints(3).folder / tag_of(3)
    described = json.loads((folder / MARKER).read_text())["files"]
    assert described.keys() == {"model.pt", "optimizer.pt"}
    for name, facts in described.items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_there_is_none_before_the_first(tmp_path: Path, one_rank: Topology) -> None:
    assert newest_state(tmp_path / "checkpoints") is None
    assert Checkpoints(tmp_path, one_rank, keep=1).newest() is None


def test_steps_are_ordered_as_numbers(checkpoints) -> None:
    assert checkpoints(9, 10, 100, 99).newest() == state_at(100)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_marker(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads((path / MARKER).read_text())
    edit(body)
    (path / MARKER).write_text(json.dumps(body))


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no marker": lambda path: (path / MARKER).unlink(),
    "flipped byte": lambda path: flip_a_byte(path / "model.pt"),
    "flipped byte of the optimizer": lambda path: flip_a_byte(path / "optimizer.pt"),
    "truncated": lambda path: (path / "model.pt").write_bytes(b"model.pt of"),
    "emptied": lambda path: (path / "model.pt").write_bytes(b""),
    "longer": lambda path: (path / "model.pt").open("ab").write(b"x"),
    "missing file": lambda path: (path / "optimizer.pt").unlink(),
    "empty marker": lambda path: (path / MARKER).write_text(""),
    "torn marker": lambda path: (path / MARKER).write_text((path / MARKER).read_text()[:50]),
    "garbage marker": lambda path: (path / MARKER).write_bytes(b"\xff\x00\x01"),
    "marker that is a list": lambda path: (path / MARKER).write_text("[1, 2]"),
    "marker that is a number": lambda path: (path / MARKER).write_text("5"),
    "marker of nothing": lambda path: (path / MARKER).write_text("{}"),
    "flipped byte of the marker": lambda path: flip_a_byte(path / MARKER),
    "other step": lambda path: edit_marker(path, lambda body: body["state"].update(step=7)),
    "other files": lambda path: edit_marker(path, lambda body: body["files"].clear()),
    "unknown state": lambda path: edit_marker(path, lambda body: body["state"].update(extra=1)),
    "no state": lambda path: edit_marker(path, lambda body: body.pop("state")),
    "marker that is a folder": lambda path: ((path / MARKER).unlink(), (path / MARKER).mkdir()),
    "not a folder": replace_by_a_file,
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: str, checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    made = checkpoints(1, 2, 3)
    damaged = made.folder / tag_of(3)
    DAMAGES[damage](damaged)
    assert made.newest() == state_at(2)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning:")
    assert str(damaged) in warning


def test_several_damaged_ones_are_all_named(
    checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    made = checkpoints(1, 2, 3)
    DAMAGES["no marker"](made.folder / tag_of(3))
    DAMAGES["truncated"](made.folder / tag_of(2))
    assert made.newest() == state_at(1)
    warnings = capsys.readouterr().err.splitlines()
    assert ["step-00000003" in w or "step-00000002" in w for w in warnings] == [True, True]
    DAMAGES["missing file"](made.folder / tag_of(1))
    assert made.newest() is None


def test_older_damage_is_of_no_interest(checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    made = checkpoints(1, 2)
    DAMAGES["flipped byte"](made.folder / tag_of(1))
    assert made.newest() == state_at(2)
    assert capsys.readouterr().err == ""


def test_checkpoints_may_be_moved(checkpoints, tmp_path: Path) -> None:
    made = checkpoints(1)
    made.folder.rename(tmp_path / "elsewhere")
    assert newest_state(tmp_path / "elsewhere") == state_at(1)


# Retention


@given(
    steps=st.sets(st.integers(1, 60), max_size=20),
    keep=st.integers(1, 5),
    keep_every=st.integers(0, 12),
)
def test_the_last_ones_and_the_milestones_are_kept(
    steps: set[int], keep: int, keep_every: int
) -> None:
    gone = {
        step_of(p) for p in superseded([Path(tag_of(s)) for s in sorted(steps)], keep, keep_every)
    }
    for step in steps:
        newer = sum(other > step for other in steps)
        is_milestone = keep_every > 0 and step % keep_every == 0
        assert (step in gone) == (newer >= keep and not is_milestone)


def test_milestones_outlive_the_others(checkpoints) -> None:
    made = checkpoints(2, 4, 6, 8, 10, keep=1, keep_every=4)
    assert names(made.folder) == [tag_of(4), tag_of(8), tag_of(10)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_complete_ones_are_kept(keep: int, checkpoints) -> None:
    made = checkpoints(1, 2, 3, 4, keep=keep)
    assert names(made.folder) == [tag_of(step) for step in range(5 - keep, 5)]


def test_retention_deletes_complete_ones_only(checkpoints) -> None:
    made = checkpoints(1, 2, 3)
    DAMAGES["no marker"](made.folder / tag_of(1))
    (made.folder / "notes.txt").write_text("mine")
    (made.folder / "step-mine").mkdir()
    checkpoints(4, keep=1)
    assert names(made.folder) == [tag_of(1), tag_of(4), "step-mine"]
    assert (made.folder / "notes.txt").exists()


def test_retention_deletes_older_ones_only(checkpoints) -> None:
    made = checkpoints(1, 2, 8, 9)
    checkpoints(5, keep=1)
    assert {tag_of(5), tag_of(8), tag_of(9)} <= set(names(made.folder))
    assert not {tag_of(1), tag_of(2)} & set(names(made.folder))


def test_a_newer_damaged_one_does_not_count_as_kept(checkpoints) -> None:
    """After a resume from step 5, since 9 was damaged, keeping two means 5 and 7."""
    made = checkpoints(3, 5, 9)
    DAMAGES["flipped byte"](made.folder / tag_of(9))
    checkpoints(7, keep=2)
    assert read_state(made.folder / tag_of(7)) == state_at(7)
    assert read_state(made.folder / tag_of(5)) == state_at(5)


def test_a_torn_attempt_at_the_same_step_is_replaced(checkpoints) -> None:
    made = checkpoints(1)
    torn = made.folder / tag_of(2)
    torn.mkdir()
    (torn / "left-over.pt").write_text("half")
    checkpoints(2)
    assert made.newest() == state_at(2)
    assert not (torn / "left-over.pt").exists()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk that is full while `full` is set, before or after the files are written."""
    disk = SimpleNamespace(full=None)
    write, publish = checkpoint._write_file, checkpoint.write_durably

    def write_file(file: Path, content: memoryview) -> dict[str, Any]:
        if disk.full == "of files" and file.name == "optimizer.pt":
            file.write_bytes(content[:50])
            raise FULL
        return write(file, content)

    def write_durably(path: Path, text: str) -> None:
        if disk.full == path.name:
            raise RunError(f"{path} cannot be written") from FULL
        publish(path, text)

    monkeypatch.setattr(checkpoint, "_write_file", write_file)
    monkeypatch.setattr(checkpoint, "write_durably", write_durably)
    return disk


@pytest.mark.parametrize("full", ["of files", MARKER, LATEST])
def test_a_full_disk_costs_a_checkpoint_and_neither_the_run_nor_the_one_before(
    full: str, checkpoints, disk: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    made, noted = checkpoints(1, keep=1), []
    made.on_failure = noted.append
    disk.full = full
    for step in (2, 3):
        made.save(FakeEngine(), state_at(step))
        made.wait()
    assert noted == [1, 2]
    assert (made.folder / LATEST).read_text() == tag_of(1)
    assert read_state(made.folder / tag_of(1)) == state_at(1)
    if full != LATEST:
        assert names(made.folder) == [tag_of(1)]  # what was written of the others is gone
    warnings = capsys.readouterr().err.splitlines()
    for number, warning in zip((1, 2), warnings, strict=True):
        assert warning.startswith("warning:")
        assert tag_of(number + 1) in warning
        assert "rank 0: No space left on device" in warning
        assert f"failure {number} of the 3 in a row" in warning
    disk.full = None
    made.save(FakeEngine(), state_at(4))
    made.finish()
    assert made.newest() == state_at(4)
    assert made.failed_saves == 0
    assert noted == [1, 2]


def test_what_a_failed_save_leaves_of_a_damaged_one_does_not_look_whole(
    checkpoints, disk: SimpleNamespace
) -> None:
    made = checkpoints(1, 2)
    DAMAGES["flipped byte of the optimizer"](made.folder / tag_of(2))
    disk.full = "of files"
    made.save(FakeEngine(), state_at(2))
    made.wait()
    assert names(made.folder) == [tag_of(1)]


def test_a_disk_with_too_little_room_is_not_filled(
    checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints(1)
    size = sum(content.nbytes for content in FakeEngine().snapshot(tag_of(2)).values())
    for free, expected in ((size - 1, 1), (size, 2)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path, usage=usage: usage)
        made.save(FakeEngine(), state_at(2))
        made.wait()
        assert made.newest() == state_at(expected)
        assert names(made.folder) == [tag_of(step) for step in range(1, expected + 1)]


def test_failures_in_a_row_end_the_run(checkpoints, disk: SimpleNamespace) -> None:
    made = checkpoints(1, max_failed_saves=2)
    disk.full = "of files"
    made.save(FakeEngine(), state_at(2))
    made.save(FakeEngine(), state_at(3))
    made.wait()
    disk.full = None
    with pytest.raises(RunError, match=r"step-00000003.*No space left.*in a row: 2.*make room"):
        made.save(FakeEngine(), state_at(4))
    assert newest_state(made.folder) == state_at(1)


def test_a_last_save_that_fails_ends_the_run(checkpoints, disk: SimpleNamespace) -> None:
    made = checkpoints(1)
    disk.full = "of files"
    made.save(FakeEngine(), state_at(2))
    with pytest.raises(RunError, match=r"step-00000002.*No space left on device"):
        made.finish()


def test_a_disk_that_does_not_keep_what_it_was_given_is_found_out(
    checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints(1)
    plain = os.fsync

    def lose(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("model.pt"):
            os.pwrite(descriptor, b"X", 7)
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", lose)
    made.save(FakeEngine(), state_at(2))
    with pytest.raises(RunError, match=r"model.pt reads back as something else"):
        made.finish()
    assert (made.folder / LATEST).read_text() == tag_of(1)


def test_training_goes_on_while_a_checkpoint_is_written(
    checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, go_on = checkpoints(1), threading.Event()
    plain = checkpoint._write_file

    def write_file(file: Path, content: memoryview) -> dict[str, Any]:
        assert go_on.wait(60)
        return plain(file, content)

    monkeypatch.setattr(checkpoint, "_write_file", write_file)
    made.save(FakeEngine(), state_at(2))
    assert made.is_busy  # and here training goes on
    assert made.newest() == state_at(1)
    go_on.set()
    settled = 0
    while made.newest() == state_at(1) or made.is_busy:
        if not made.is_busy:
            made.settle()
            settled += 1
    assert settled == 1  # the parts were on disk; rank 0 published them
    made.settle()
    assert made.newest() == state_at(2)
    assert not made.is_busy


class KilledError(BaseException):
    pass


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Calls a function until its n-th change of the file system; returns whether it got there."""

    def run(limit: int, function: Callable[[], object]) -> bool:
        calls = 0

        def counted(plain: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KilledError
            return plain(*arguments, **options)

        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, functools.partial(counted, getattr(os, name)))
            try:
                function()
            except KilledError:
                return True
        return False

    return run


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(checkpoints, killed_at) -> None:
    for limit in range(1, 100):
        made = checkpoints(keep=1)
        shutil.rmtree(made.folder, ignore_errors=True)
        checkpoints(1)
        is_killed = killed_at(limit, lambda: checkpoints(2, keep=1))
        for marker in made.folder.glob(f"step-*/{MARKER}"):
            read_state(marker.parent)  # nothing half has a marker
        assert newest_state(made.folder) in (state_at(1), state_at(2))
        if not is_killed:
            break
    assert 10 < limit < 99
    assert newest_state(made.folder) == state_at(2)


@pytest.mark.parametrize(
    ("world_size", "stage", "expected"),
    [(1, 2, False), (2, 2, True), (1, 3, True), (2, 3, True)],
)
def test_foreign_is_what_other_ranks_or_another_stage_wrote(
    world_size: int, stage: int, expected: bool
) -> None:
    now = dataclasses.replace(state_at(1), identity={STAGE_KEY: 2, "seed": 1})
    saved = State(step=1, tokens=10, world_size=world_size, identity={STAGE_KEY: stage, "seed": 2})
    assert is_foreign(saved, now) is expected


# What a run is


@pytest.fixture
def identity_of(make_recipe: Callable[..., Recipe]) -> Callable[..., dict[str, Any]]:
    def make(policy: dict[str, Any] = POLICY, digest: str = "d", **recipe: Any) -> dict[str, Any]:
        return identity(make_recipe(**recipe), policy, digest)

    return make


def test_a_checkpoint_holds_the_identity_as_it_is(identity_of) -> None:
    made = identity_of()
    assert json.loads(json.dumps(made)) == made
    assert made["train.learning_rate"] == 6e-4
    assert made["deepspeed.zero_optimization.stage"] == 2
    assert made["data.shards (content)"] == "d"
    assert made["train.adam_betas"] == [0.9, 0.999]


def test_free_keys_are_keys_of_the_recipe(make_recipe: Callable[..., Recipe]) -> None:
    """A key that is renamed must not be left here under its old name."""
    assert flatten(make_recipe()).keys() >= FREE_KEYS


CHANGES = [
    ({"seed": 2}, "seed"),
    ({"train": {"max_steps": 11}}, "train.max_steps"),
    ({"train": {"batch_size": 16}}, "train.batch_size"),
    ({"train": {"micro_batch_size": 4}}, "train.micro_batch_size"),
    ({"train": {"adam_betas": (0.9, 0.98)}}, "train.adam_betas"),
    ({"train": {"warmup_steps": 1}}, "train.warmup_steps"),
    ({"teacher": {"layer": 1}}, "teacher.layer"),
    ({"student": {"hidden_dropout_prob": 0.2}}, "student.hidden_dropout_prob"),
    ({"objective": {"relations": {"qq": 1.0}}}, "objective.relations.kk"),
    (
        {"policy": {**POLICY, "zero_optimization": {"stage": 3}}},
        "deepspeed.zero_optimization.stage",
    ),
    ({"digest": "e"}, "data.shards (content)"),
]


@pytest.mark.parametrize(("changes", "key"), CHANGES, ids=str)
def test_a_change_is_refused_by_name_unless_it_is_allowed(
    changes: dict[str, Any], key: str, identity_of
) -> None:
    saved, now = identity_of(), identity_of(**changes)
    with pytest.raises(ConfigError) as caught:
        check_identity(saved, now, [])
    message = str(caught.value)
    assert f"{key} (was {saved.get(key)!r}, is {now.get(key)!r})" in message
    assert f"--allow_change {key!r}" in message

    changed = [name for name in {*saved, *now} if saved.get(name) != now.get(name)]
    check_identity(saved, now, changed)
    section = key.partition(".")[0]
    check_identity(saved, now, [section] if "." in key else [key])
    for allowed in ("train.max_step", "train.learning_rate", "see", "deep", "data.shards", ""):
        with pytest.raises(ConfigError):
            check_identity(saved, now, [allowed])


def test_all_changed_keys_are_named_and_only_these(identity_of) -> None:
    saved = identity_of()
    now = identity_of(seed=2, train={"max_steps": 11, "weight_decay": 0.5})
    with pytest.raises(ConfigError) as caught:
        check_identity(saved, now, ["seed"])
    message = str(caught.value)
    assert "train.max_steps" in message
    assert "train.weight_decay" in message
    assert "seed" not in message
    assert "learning_rate" not in message
    assert "--allow_change 'train.max_steps' --allow_change 'train.weight_decay'" in message


def test_the_remedy_that_is_named_works(identity_of) -> None:
    saved, now = identity_of(), identity_of(seed=2, train={"max_steps": 11})
    with pytest.raises(ConfigError) as caught:
        check_identity(saved, now, [])
    allowed = re.findall(r"--allow_change '([^']+)'", str(caught.value))
    check_identity(saved, now, allowed)


FREE_CHANGES: dict[str, Any] = {
    "output_dir": "runs/elsewhere",
    "students": [Variant(name="x")],
    "data": {
        "shards": "a-copy",
        "prepare": True,
        "row_log": True,
        "verify": "always",
        "cache_dir": "/local",
        "cache_gb": 1.0,
    },
    "train": {
        "save_every": 7,
        "keep_checkpoints": 7,
        "keep_every": 7,
        "max_failed_saves": 7,
        "log_every": 7,
        "eval_every": 7,
    },
    "watch": {"hang_seconds": 7.0, "straggler_percent": 7.0, "check_corruption_every": 7},
}


def test_what_cannot_change_what_is_learned_may_change(identity_of) -> None:
    assert set(flatten(FREE_CHANGES)) == FREE_KEYS
    check_identity(identity_of(), identity_of(**FREE_CHANGES), [])


def test_preparation_settings_count_by_the_shards_they_made(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe()
    prep = dataclasses.replace(recipe.prep, text_key="body")
    other = dataclasses.replace(recipe, prep=prep)
    assert identity(recipe, POLICY, "d") == identity(other, POLICY, "d")


def test_a_key_that_came_or_went_is_a_change() -> None:
    check_identity({"a": 1, "b": None}, {"a": 1}, [])
    with pytest.raises(ConfigError, match=r"b \(was None, is 2\)"):
        check_identity({"a": 1}, {"a": 1, "b": 2}, [])
    with pytest.raises(ConfigError, match=r"b \(was 2, is None\)"):
        check_identity({"a": 1, "b": 2}, {"a": 1}, [])


def test_what_only_watches_or_repeats_the_recipe_may_change_in_the_ds_config(identity_of) -> None:
    policy = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    watching = {"wall_clock_breakdown": True, "train_batch_size": 8, "optimizer": {"type": "AdamW"}}
    assert identity_of(policy=policy) == identity_of(policy={**policy, **watching})
