from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep import spill as spill_module
from data_prep.command import RunError
from data_prep.config import Prep
from data_prep.pack import Segment
from data_prep.spill import Spills, spill
from data_prep.tokenizer import Tokenizer

TEXTS = [f"Text number {i}, with {i * i} words or fewer." for i in range(50)]


@pytest.fixture
def spilled(tmp_path: Path, tokenizer: Tokenizer, write_jsonl) -> Path:
    """Two units: one of text, one of a file without any."""
    work = tmp_path / "work"
    work.mkdir()
    files = [
        write_jsonl(tmp_path / "en.jsonl", [{"text": text} for text in TEXTS]),
        write_jsonl(tmp_path / "sw.jsonl", [{"text": ""}]),
    ]
    for unit, path in enumerate(files):
        spill(path, unit, work, Prep(), tokenizer)
    return work


def test_tokens_and_records_come_back(spilled: Path, tokenizer: Tokenizer) -> None:
    spills = Spills(spilled, 2, tokenizer.dtype)
    assert len(spills.documents) == len(TEXTS)
    for record, text, ids in zip(spills.documents, TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert (record["tokens"], record["chars"]) == (len(ids), len(text))
        assert (record["language"], record["unit"]) == (b"en", 0)
        whole = spills.tokens(record, Segment(0, 0, len(ids)))
        np.testing.assert_array_equal(whole, ids)
        np.testing.assert_array_equal(spills.tokens(record, Segment(0, 2, 3)), ids[2:5])
    assert spills.counts["en", "documents_in"] == len(TEXTS)
    assert spills.counts["sw", "documents_empty"] == 1


def test_batches_change_nothing(
    spilled: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(spill_module, "BATCH_CHARS", 100)
    spill(tmp_path / "en.jsonl", 0, other, Prep(), tokenizer)
    for suffix in ("tokens", "npy", "json"):
        name = f"unit-000000.{suffix}"
        assert (other / name).read_bytes() == (spilled / name).read_bytes()


def test_a_finished_unit_is_not_done_again(
    spilled: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "en.jsonl").unlink()
    spill(tmp_path / "en.jsonl", 0, spilled, Prep(), tokenizer)
    (spilled / "unit-000000.json").unlink()
    with pytest.raises(RunError, match=r"en\.jsonl cannot be read"):
        spill(tmp_path / "en.jsonl", 0, spilled, Prep(), tokenizer)
    assert not (spilled / "unit-000000.json").exists()
