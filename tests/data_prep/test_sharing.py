from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from data_prep.command import ElsewhereError, RunError
from data_prep.ranks import OneRank
from data_prep.sharing import share

PATIENCE = 30  # seconds after which a test that waits has failed


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("units", [0, 1, 4, 97])
def test_every_unit_is_done_once(on_ranks, tmp_path: Path, size: int, units: int) -> None:
    done: list[int] = []
    sizes = [unit % 7 for unit in range(units)]
    outcomes = on_ranks(size, lambda ranks: share(ranks, tmp_path / "c", sizes, done.append, "x"))
    assert outcomes == [None] * size
    assert sorted(done) == list(range(units))


def test_one_rank_does_the_largest_first(tmp_path: Path) -> None:
    done: list[int] = []
    share(OneRank(), tmp_path / "claims", [3, 9, 1, 9, 4], done.append, "x")
    assert done == [1, 3, 4, 0, 2]


def test_others_take_the_share_of_a_slow_rank(on_ranks, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    slow_has_begun, others_are_done = threading.Event(), threading.Event()

    def run(ranks) -> None:
        def work(unit: int) -> None:
            if ranks.rank == 0:
                slow_has_begun.set()
                assert others_are_done.wait(PATIENCE)
            assert slow_has_begun.wait(PATIENCE)
            done.append((ranks.rank, unit))
            if len(done) == 29:
                others_are_done.set()

        share(ranks, tmp_path / "claims", [1] * 30, work, "x")

    assert on_ranks(3, run) == [None] * 3
    assert sorted(unit for _, unit in done) == list(range(30))
    assert [rank for rank, _ in done].count(0) == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_when_a_rank_fails_the_others_end_their_unit_and_all_raise(
    on_ranks, tmp_path: Path, failing: int
) -> None:
    begun: list[int] = []
    claims = tmp_path / "claims"

    def run(ranks) -> None:
        def work(unit: int) -> None:
            begun.append(unit)
            if ranks.rank == failing:
                raise RunError("the disk is full")
            until = time.monotonic() + PATIENCE
            while not (claims / "failed").exists():
                assert time.monotonic() < until
                time.sleep(0.001)

        share(ranks, claims, [1] * 100, work, "x")

    first, *others = on_ranks(3, run)
    assert isinstance(first, RunError)
    assert str(first) == "the disk is full"
    assert [type(other) for other in others] == [ElsewhereError] * 2
    assert len(begun) <= 3


def test_claims_of_the_dead_say_nothing(on_ranks, tmp_path: Path) -> None:
    claims = tmp_path / "claims"
    claims.mkdir()
    for name in ("0", "1", "failed"):
        (claims / name).touch()
    done: list[int] = []
    on_ranks(2, lambda ranks: share(ranks, claims, [1, 1, 1], done.append, "x"))
    assert sorted(done) == [0, 1, 2]


def test_the_reason_of_a_failure_is_said_though_the_claims_folder_is_gone(tmp_path: Path) -> None:
    def work(unit: int) -> None:
        shutil.rmtree(tmp_path / "claims")
        raise RunError("the folder was removed")

    with pytest.raises(RunError, match="the folder was removed"):
        share(OneRank(), tmp_path / "claims", [1], work, "x")


def test_a_bug_in_the_work_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        share(OneRank(), tmp_path / "claims", [1], lambda unit: unit // 0, "x")
