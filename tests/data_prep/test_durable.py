from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data_prep.command import RunError
from data_prep.durable import durable_write, write_durably


def test_bytes_appear_whole_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with durable_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_are_on_disk_before_they_have_their_name(tmp_path: Path, monkeypatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with durable_write(tmp_path / "file") as stream:
        stream.write(b"new")
    assert order == ["sync file.partial", "replace", f"sync {tmp_path.name}"]


def test_text_replaces_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, "one")
    write_durably(path, "two ✓")
    assert path.read_text(encoding="utf-8") == "two ✓"
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_appears_when_the_writer_fails(tmp_path: Path) -> None:
    def write() -> None:
        with durable_write(tmp_path / "file") as stream:
            stream.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_named_and_not_left_fuller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "write":
        monkeypatch.setattr(os, step, full)
    path = tmp_path / "file"

    def write() -> None:
        with durable_write(path) as stream:
            stream.write(b"half")
            if step == "write":
                full()

    with pytest.raises(RunError, match=rf"{path} cannot be written \(No space left on device\)"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_a_failure_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file"), durable_write(tmp_path / "no" / "file"):
        pass
