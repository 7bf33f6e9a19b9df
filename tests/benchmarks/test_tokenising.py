from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_counts_the_same_tokens_for_all_and_for_each_language(tmp_path: Path) -> None:
    for language in ("de", "zh"):
        lines = (ROOT / "recipes" / "demo_text" / f"{language}.jsonl").read_bytes()
        (tmp_path / f"{language}.jsonl.gz").write_bytes(gzip.compress(lines))
    script = str(ROOT / "benchmarks" / "tokenising.py")
    options = ["--corpus", str(tmp_path), "--megabytes", "0.02", "--json", "--no_save"]
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    tokens = {row["text"]: row["tokens"] for row in result["rows"]}
    assert tokens.keys() == {"all, mixed", "de", "zh"}
    assert tokens["all, mixed"] == tokens["de"] + tokens["zh"]
    assert result["ratio"]["value"] > 0
