from __future__ import annotations

import pytest
import torch

from pipeline.stragglers import seconds_of_ranks, slowest, warn_of_straggler

HOSTS = ["a", "b", "c", "d"]


def test_the_slowest_is_held_against_the_median_of_the_others() -> None:
    assert slowest([1.0, 9.0, 2.0, 3.0]) == (1, 9.0, 2.0)
    assert slowest([1.0, 2.0]) == (1, 2.0, 1.0)
    assert slowest([4.0]) == (0, 4.0, 4.0)


def test_it_is_named_with_its_host(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_straggler(20, [0.010, 0.010, 0.0149, 0.010], HOSTS, percent=50)
    assert capsys.readouterr().err == ""
    warn_of_straggler(20, [0.010, 0.010, 0.0152, 0.010], HOSTS, percent=50)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step 20: rank 2 (c) ")
    assert "15 ms a step, the others in 10 ms" in line


def test_alone_nobody_is_slow(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_straggler(20, seconds_of_ranks(3.0, 0, 1, torch.device("cpu")), ["a"], percent=50)
    assert capsys.readouterr().err == ""
