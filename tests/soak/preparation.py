"""Kills a preparation at random moments: `python -m tests.soak.preparation [--kills 100]`.

Every round kills one twice, at random ones of its file operations, lets it finish and compares all
files with those of an undisturbed one; exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from tests.pipeline.launch import ROOT

SETTINGS = {
    "input": [str(ROOT / "recipes" / "demo_text" / "*.jsonl")],
    "tokenizer": str(ROOT / "models" / "pocket-teacher"),
    "seq_len": 128,
    "heldout_rows": 2,
    "rows_per_block": 32,
    "blocks_per_shard": 2,
    "dedup_lines": True,
    "near_duplicates": 0.8,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.preparation", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    program = str(ROOT / "tests" / "data_prep" / "killed.py")
    numbers = [str(options.kills // 2), str(options.seed)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, program, *numbers, json.dumps(SETTINGS), folder]
        return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
