"""Run the benchmarks that need DeepSpeed in this one process; print their results as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import peak_memory, scaling, step_vs_padded
from benchmarks.workload import TINY, save_teacher

QUICK = ["--json", "--no_save", "--shape", "tiny"]


def main(folder: Path) -> None:
    with mock.patch.object(peak_memory, "in_fresh_process", lambda function, *a: function(*a)):
        for benchmark, options in (
            (step_vs_padded, ["--rows", "4", "--repeats", "1"]),
            (peak_memory, ["--rows", "128", "--batches", "1"]),
        ):
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                benchmark.main([*QUICK, *options])
            print(json.dumps(json.loads(text.getvalue())))
    save_teacher(TINY, folder / "teacher")
    os.environ.update(RANK="0", WORLD_SIZE="1")
    options = argparse.Namespace(shape="tiny", batches=1, rows=2, repeats=1, rank_of=folder)
    scaling.run_rank(options)
    print((folder / "speed-1.json").read_text("utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
