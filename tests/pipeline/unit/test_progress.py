from __future__ import annotations

import threading
import time

import pytest

from pipeline import progress
from pipeline.progress import Progress, part, whereabouts


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Progress:
    fresh = Progress()
    monkeypatch.setattr(progress, "PROGRESS", fresh)
    return fresh


def test_a_place_in_words(here: Progress) -> None:
    assert here.describe() == "step 0, starting"
    here.begin("reading", step=8)
    here.begin("micro-batch 1 of 4")
    with part("teacher"):
        assert here.describe() == "step 8, micro-batch 1 of 4, teacher"
    here.begin("saving")
    assert here.describe() == "step 8, saving"
    assert here.count == 4


def test_own_work_is_of_one_step_and_of_no_part_that_waits(here: Progress) -> None:
    here.begin("reading", step=1)
    with part("data"):
        time.sleep(0.02)
    with part("teacher"):
        time.sleep(0.03)
    own = here.own_seconds()
    assert own >= 0.05
    with part("backward"):
        time.sleep(0.01)
    assert here.own_seconds() == own
    here.begin("reading", step=2)
    assert here.own_seconds() == 0


def test_a_part_can_decorate(here: Progress) -> None:
    @part("loss")
    def loss() -> str:
        return here.part

    assert (loss(), loss(), here.count) == ("loss", "loss", 2)


def test_whereabouts_are_the_projects_own_line() -> None:
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with part("loss"):
            inside.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    assert whereabouts(thread.ident or 0) == ("no line of this project", False)
    done.set()
    thread.join()
    line, waits = whereabouts(threading.get_ident())
    assert line.startswith("pipeline/progress.py:")
    assert line.endswith(" whereabouts")
    assert not waits
