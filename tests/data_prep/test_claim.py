from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from data_prep import claim
from data_prep.claim import close_work, is_prepared, locked, open_work
from data_prep.command import ConfigError, ElsewhereError, RunError
from data_prep.ranks import OneRank
from data_prep.shards import Manifest


def can_lock(folder: Path, kind: int = fcntl.LOCK_EX) -> bool:
    with open(folder / ".lock", "a+b") as stream:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_lock_keeps_a_second_preparation_out(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder, OneRank()):
        with (
            pytest.raises(ConfigError, match=rf"another .* prep\.output_dir={folder}"),
            locked(folder, OneRank()),
        ):
            pytest.fail("two at once")
        assert not can_lock(folder)
    assert can_lock(folder)


def test_several_ranks_share_the_lock_and_each_of_them_keeps_it(tmp_path: Path, on_ranks) -> None:
    seen: list[bool] = []

    def rank(ranks) -> None:
        with contextlib.ExitStack() as held:
            held.enter_context(locked(tmp_path, ranks))
            for leaving in range(3):
                ranks.allgather(None)
                if ranks.rank == 0:
                    seen.append(can_lock(tmp_path))
                ranks.allgather(None)
                if ranks.rank == leaving:
                    held.close()

    assert on_ranks(3, rank) == [None] * 3
    assert seen == [False] * 3
    assert can_lock(tmp_path)


def test_a_rank_that_outlives_its_launcher_keeps_the_lock(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "a+b") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_SH)
        with pytest.raises(ConfigError), locked(tmp_path, OneRank()):
            pytest.fail("went on beside an orphan")


def test_every_rank_leaves_when_the_folder_is_taken(tmp_path: Path, on_ranks) -> None:
    def rank(ranks) -> None:
        with locked(tmp_path, ranks):
            pytest.fail("two at once")

    with locked(tmp_path, OneRank()):
        outcomes = on_ranks(2, rank)
    assert [type(outcome) for outcome in outcomes] == [ConfigError, ElsewhereError]


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claim.fcntl, "flock", unsupported)
    with locked(tmp_path, OneRank()):
        pass


def test_work_of_the_same_settings_is_gone_on_from(tmp_path: Path) -> None:
    open_work(tmp_path, "settings")
    (tmp_path / ".work" / "unit-000000.json").touch()
    (tmp_path / "train-000000.tar").touch()
    open_work(tmp_path, "settings")
    assert (tmp_path / ".work" / "unit-000000.json").exists()
    assert (tmp_path / "train-000000.tar").exists()


def test_work_of_other_settings_is_removed(tmp_path: Path) -> None:
    open_work(tmp_path, "settings")
    (tmp_path / ".work" / "unit-000000.json").touch()
    for name in ("train-000000.tar", "train-000001.tar.partial", "notes.txt"):
        (tmp_path / name).touch()
    open_work(tmp_path, "others")
    assert sorted(os.listdir(tmp_path)) == [".work", "notes.txt"]
    assert os.listdir(tmp_path / ".work") == ["settings"]


def test_tars_that_no_preparation_began_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.tar").write_bytes(b"photos")
    with pytest.raises(ConfigError, match=r"holiday\.tar"):
        open_work(tmp_path, "settings")
    assert os.listdir(tmp_path) == ["holiday.tar"]


@pytest.mark.parametrize("moment", range(4))
def test_a_removal_that_was_interrupted_is_never_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed while clearing the work of other settings, then started again with those."""
    open_work(tmp_path, "first")
    (tmp_path / ".work" / "unit-000000.json").touch()
    (tmp_path / "train-000000.tar").touch()
    calls = 0

    def step(original):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", step(Path.unlink))
        patch.setattr(claim.shutil, "rmtree", step(claim.shutil.rmtree))
        patch.setattr(Path, "mkdir", step(Path.mkdir))
        with pytest.raises(KeyboardInterrupt):
            open_work(tmp_path, "second")
    open_work(tmp_path, "first")
    if moment:  # the first step was done
        assert not (tmp_path / ".work" / "unit-000000.json").exists()
        assert not (tmp_path / "train-000000.tar").exists()
    else:
        assert (tmp_path / ".work" / "unit-000000.json").exists()


def test_close_work_leaves_the_shards(tmp_path: Path) -> None:
    open_work(tmp_path, "settings")
    (tmp_path / "train-000000.tar").touch()
    (tmp_path / ".lock").touch()
    close_work(tmp_path)
    close_work(tmp_path)  # whoever comes second finds nothing to do
    assert os.listdir(tmp_path) == ["train-000000.tar"]


def test_is_prepared(tmp_path: Path, prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert not is_prepared(tmp_path, "any")
    assert is_prepared(folder, manifest.settings)
    with pytest.raises(ConfigError, match="other text or settings"):
        is_prepared(folder, "others")


def test_finished_shards_that_are_damaged_are_not_called_prepared(
    tmp_path: Path, prepared: tuple[Path, Manifest]
) -> None:
    folder, manifest = prepared
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "train-000001.tar").unlink()
    with pytest.raises(RunError, match=r"train-000001\.tar is missing"):
        is_prepared(copy, manifest.settings)
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        is_prepared(copy, manifest.settings)
