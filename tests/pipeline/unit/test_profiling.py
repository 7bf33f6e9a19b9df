from __future__ import annotations

import json
from pathlib import Path

from torch.profiler import record_function

from pipeline.profiling import ACTIVE, PARTS, WARM_UP, profiling


def steps(folder: Path, count: int, *, enabled: bool) -> None:
    with profiling(folder, enabled=enabled, rank=3) as after_step:
        for _ in range(count):
            with record_function("step"):
                for part in PARTS:
                    with record_function(part):
                        sum(range(20000))
            after_step()


def test_it_leaves_a_trace_and_a_table(tmp_path: Path) -> None:
    steps(tmp_path / "profile", WARM_UP + ACTIVE, enabled=True)
    trace = json.loads((tmp_path / "profile" / "rank-00003.trace.json").read_text())
    recorded = [event for event in trace["traceEvents"] if event.get("name") == "teacher"]
    assert len(recorded) == ACTIVE
    lines = (tmp_path / "profile" / "rank-00003.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[: len(PARTS) + 2]] == [*PARTS, "rest", "step"]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[: len(PARTS) + 1]]
    assert abs(sum(shares) - 100) < 1
    assert min(shares[:-1]) > 5  # parts alike have like shares


def test_without_the_option_nothing_is_written(tmp_path: Path) -> None:
    steps(tmp_path / "profile", WARM_UP + ACTIVE, enabled=False)
    assert not (tmp_path / "profile").exists()
