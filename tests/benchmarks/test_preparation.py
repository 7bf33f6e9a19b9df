from __future__ import annotations

import gzip
import json
from pathlib import Path

import orjson
import pytest

from benchmarks import preparation

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for language in ("de", "zh"):
        lines = (ROOT / "recipes" / "demo_text" / f"{language}.jsonl").read_bytes()
        (folder / f"{language}.jsonl.gz").write_bytes(gzip.compress(lines))
    return folder


def test_every_measurement_is_in_the_table(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparation, "TINY", 0.005)
    options = ["--megabytes", "0.1", "--repeats", "1", "--json", "--no_save"]
    preparation.main(["--corpus", str(corpus), *options])
    result = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in result["rows"]}
    assert rows.keys() >= {"start-up", "tokenizers", "Tokenizer.encode", "preparation"}
    assert all(row["CPU s"] > 0 and row["peak MB"] > 10 for row in rows.values())
    assert rows["preparation"]["MB"] == pytest.approx(0.1, rel=0.1)
    assert result["ratio"]["value"] == result["ratios"]["tokenizers / preparation"] > 0
    assert 0.5 < result["ratios"]["fill of rows"] <= 1


def test_no_document_of_the_corpus_is_a_duplicate(corpus: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    megabytes = preparation.synthesise(corpus, made, 0.2)
    batch = [text for texts in preparation.batches(made) for text in texts]
    assert len(set(batch)) == len(batch)
    assert sum(len(text.encode()) for text in batch) == pytest.approx(megabytes * 1e6)
    sizes = [
        sum(len(orjson.loads(line)["text"].encode()) for line in path.open("rb"))
        for path in sorted(made.iterdir())
    ]
    longest = max(len(text.encode()) for text in batch)
    assert len(sizes) == 2
    assert all(0 <= size - 1e5 < longest for size in sizes)
