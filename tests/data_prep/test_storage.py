from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tenacity

from data_prep import storage
from data_prep.command import RunError
from data_prep.storage import ATTEMPTS, Storage, is_transient
from tests.data_prep.flaky_http import FlakyServer, flaky_server

DATA = random.Random(1).randbytes(5000)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited for."""
    slept: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", slept.append)
    return slept


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FlakyServer]:
    (tmp_path / "a.bin").write_bytes(DATA)
    with flaky_server(tmp_path) as flaky:
        yield flaky


PASSING = ["500", "short", "cut", "drop", "whole"]
BY_CLIENT = {"drop": 2}  # requests of an attempt: the client tries once more by itself


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(
    server: FlakyServer, waits: list[float], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [fault] * 2 * BY_CLIENT.get(fault, 1)
    assert Storage(server.url).read("a.bin", 100, 4000) == DATA[100:4000]
    assert len(waits) == 2
    assert [method for method, _ in server.requests] == ["GET"] * (2 * BY_CLIENT.get(fault, 1) + 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert line.startswith(f"warning: {server.url}/a.bin: ")
        assert f"attempt {number + 2} of {ATTEMPTS}" in line


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_after_all_ends_with_the_remedy(
    server: FlakyServer, waits: list[float], fault: str
) -> None:
    server.faults = [fault] * 100
    with pytest.raises(RunError, match=f"a.bin cannot be read: all {ATTEMPTS} attempts.*start"):
        Storage(server.url).read("a.bin", 100, 4000)
    assert len(server.requests) == ATTEMPTS * BY_CLIENT.get(fault, 1)
    bounds = [min(0.5 * 2**n, storage.LONGEST_WAIT) for n in range(ATTEMPTS - 1)]
    assert len(waits) == len(bounds)
    assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def wrong(data: bytes) -> str | None:
    return None if data == DATA[100:4000] else "these are others"


def test_wrong_bytes_are_fetched_again_and_given_back_at_last(
    server: FlakyServer, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = ["garbled"] * 2
    assert Storage(server.url).read("a.bin", 100, 4000, wrong) == DATA[100:4000]
    assert len(waits) == 2
    assert f"a.bin: these are others; attempt 2 of {ATTEMPTS}" in capsys.readouterr().err
    server.faults = ["garbled"] * ATTEMPTS
    assert wrong(Storage(server.url).read("a.bin", 100, 4000, wrong))
    assert server.faults == []


def test_wrong_bytes_of_a_local_file_are_given_back_at_once(
    tmp_path: Path, waits: list[float]
) -> None:
    (tmp_path / "a.bin").write_bytes(b"wrong")
    assert Storage(str(tmp_path)).read("a.bin", 0, 5, wrong) == b"wrong"
    assert waits == []


def test_what_lasts_is_not_tried_again(server: FlakyServer, waits: list[float]) -> None:
    there = Storage(server.url)
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        there.read("b.bin")
    server.faults = ["403"]
    with pytest.raises(RunError, match=r"a\.bin cannot be read.*403.*would not help"):
        there.read("a.bin", 0, 10)
    assert len(server.requests) == 2
    assert waits == []


def test_a_server_that_is_not_there_is_named(waits: list[float], tmp_path: Path) -> None:
    with flaky_server(tmp_path) as flaky:
        url = flaky.url
    with pytest.raises(RunError, match=f"{url}/x cannot be read: all {ATTEMPTS} attempts"):
        Storage(url).read("x")
    assert len(waits) == ATTEMPTS - 1


def test_random_faults_change_no_byte(server: FlakyServer, waits: list[float]) -> None:
    draw = random.Random(2)
    server.faults = [draw.choice([*PASSING, *[""] * 9]) for _ in range(90)]
    there = Storage(server.url)
    while server.faults:
        start = draw.randrange(4990)
        stop = draw.randrange(start + 1, 5001)
        assert there.read("a.bin", start, stop) == DATA[start:stop]


def test_local_files_are_read_and_lost_ones_named(tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    here = Storage(str(tmp_path))
    assert not here.is_remote
    assert here.read("a.bin") == DATA
    assert here.read("a.bin", 4000, 6000) == DATA[4000:]
    for path in ("b.bin", "a.bin/b.bin"):
        with pytest.raises(FileNotFoundError, match=r"b\.bin"):
            here.read(path)
    with pytest.raises(RunError, match="would not help"):
        here.read(".")
    assert waits == []


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), TimeoutError(), ConnectionError()])
def test_a_mount_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    (tmp_path / "a.bin").write_bytes(DATA)
    here, failures = Storage(str(tmp_path)), [error, error]
    plain = here._fs.cat_file

    def cat_file(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return plain(*args, **options)

    monkeypatch.setattr(here._fs, "cat_file", cat_file)
    assert here.read("a.bin") == DATA
    assert len(waits) == 2


def test_a_bug_is_neither_tried_again_nor_renamed(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Storage(str(tmp_path))
    for name, call in (("cat_file", lambda: here.read("a")), ("size", lambda: here.sizes(["a"]))):
        monkeypatch.setattr(here._fs, name, lambda *args, **options: {}["no"])
        with pytest.raises(KeyError):
            call()
    assert waits == []


# Sizes


class CountingFileSystem(fsspec.get_filesystem_class("memory")):
    """Memory that counts what is asked of it, and can refuse to be listed."""

    protocol = "counting"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.at_once: list[int] = []
        self.is_listable = True

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.asked.append("ls")
        if not self.is_listable:
            raise PermissionError("listing is not for you")
        return super().ls(path, detail=detail, **options)

    def size(self, path: str) -> int:
        self.asked.append("size")
        self.at_once.append(sum(t.name.startswith("ThreadPool") for t in threading.enumerate()))
        threading.Event().wait(0.001)
        return int(self.store[path].size) if path in self.store else self._missing(path)

    def _missing(self, path: str) -> int:
        raise FileNotFoundError(path)


@pytest.fixture
def counting() -> Storage:
    """200 files of 0 to 199 bytes."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    there = Storage("counting://folder")
    for number in range(200):
        there._fs.pipe_file(f"{there._root}/{number}.tar", b"x" * number)
    there._fs.asked.clear()
    return there


NAMES = [f"{number}.tar" for number in range(200)]


def test_one_listing_tells_all_sizes(counting: Storage) -> None:
    assert counting.sizes(NAMES) == dict(zip(NAMES, range(200), strict=True))
    assert counting._fs.asked == ["ls"]


def test_where_listing_is_refused_files_are_asked_for_several_at_once(counting: Storage) -> None:
    counting._fs.is_listable = False
    assert counting.sizes(NAMES) == dict(zip(NAMES, range(200), strict=True))
    assert counting._fs.asked == ["ls", *["size"] * 200]
    assert 1 < max(counting._fs.at_once) <= storage.AT_ONCE


@pytest.mark.parametrize("is_listable", [True, False])
def test_a_missing_file_is_named(counting: Storage, is_listable: bool) -> None:
    counting._fs.is_listable = is_listable
    with pytest.raises(FileNotFoundError, match=r"folder/200\.tar"):
        counting.sizes([*NAMES, "200.tar"])


def test_sizes_over_http(server: FlakyServer, waits: list[float]) -> None:
    assert Storage(server.url).sizes(["a.bin"]) == {"a.bin": len(DATA)}
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        Storage(server.url).sizes(["a.bin", "b.bin"])
    assert waits == []


def test_the_cause_decides_whether_not_found_is_true() -> None:
    aiohttp = pytest.importorskip("aiohttp")
    for status, expected in ((404, False), (403, False), (416, False), (429, True), (503, True)):
        answer = aiohttp.ClientResponseError(None, (), status=status)
        assert is_transient(answer) is expected
        wrapped = FileNotFoundError("x")
        wrapped.__cause__ = answer
        assert is_transient(wrapped) is expected
    lost = FileNotFoundError("x")
    lost.__cause__ = aiohttp.ServerDisconnectedError()
    assert is_transient(lost)
    assert not is_transient(FileNotFoundError("x"))
