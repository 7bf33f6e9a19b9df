from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.watchdog import BEATS_TO_ANSWER, Record, _Heard, blame

NOW = 50
RECORD = Record(
    rank=0, host="n0", process=70, step=8, count=30, place="P", line="L", waits=True, beat=9
)


def heard(*changes: dict[str, Any], late: tuple[int, ...] = ()) -> dict[int, _Heard]:
    """Ranks like RECORD but for the changes; late ones have not answered for too long."""
    return {
        rank: _Heard(
            dataclasses.replace(RECORD, rank=rank, **change),
            NOW - BEATS_TO_ANSWER - (rank in late),
        )
        for rank, change in enumerate(changes)
    }


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        (heard({}, {"count": 29, "waits": False}, {}), [1]),
        (heard({}, {"count": 29}, {}), [1]),  # it waits for what nobody else takes part in
        (heard({"step": 7, "count": 40}, {}, {}), [0]),
        (heard({}, {}, {"waits": False}), [2]),
        (heard({"count": 29}, {}, {}, late=(2,)), [2]),
        (heard({}, {"count": 29}, {"count": 29}), [1, 2]),
    ],
)
def test_who_is_behind(ranks: dict[int, _Heard], named: list[int]) -> None:
    text, _, ahead = blame(ranks, NOW).partition(", while ")
    assert [int(words.split()[1]) for words in text.split("; ")] == named
    assert ahead.endswith("is in P")


def test_it_says_where_and_whether_they_answer() -> None:
    text = blame(heard({}, {"host": "n7"}, late=(1,)), NOW)
    assert text == (
        "rank 1 (n7, process 70) does not answer and was last in P (L), while rank 0 is in P"
    )


def test_nobody_is_behind() -> None:
    assert blame(heard({}, {}), NOW).endswith(", and no rank is behind the others")
    assert blame(heard({"waits": False}), NOW) == "rank 0 (n0, process 70) is in P (L)"


def test_many_are_counted() -> None:
    text = blame(heard(*[{"count": 1}] * 7, {}), NOW)
    assert text.count("process") == 4
    assert "; and 3 more, while rank 7" in text
