from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from data_prep.build_shards import main
from data_prep.command import RunError
from data_prep.config import Prep
from data_prep.estimate import check_disk, disk_needed, estimate_table
from data_prep.sources import find_sources
from data_prep.tokenizer import Tokenizer


def rows(table: str) -> dict[str, list[str]]:
    """Language -> cells."""
    lines = [line.split() for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines[1:] if re.fullmatch(r"[\d.]+", cells[-1])}


def tokens(cells: list[str]) -> int:
    return int(cells[0].replace(",", ""))


def test_all_of_a_small_corpus_is_counted(small_prep: Prep, prepare, tokenizer) -> None:
    """What is smaller than the samples is no estimate: it is what preparation finds."""
    _, manifest = prepare(smoothing=1.0, heldout_rows=0)
    table = estimate_table(find_sources(small_prep.input), small_prep, tokenizer, 1)
    found = {name: tokens(cells) for name, cells in rows(table).items()}
    # rows that are cut up to fill holes have a few frames more
    assert found == pytest.approx(manifest.tokens, rel=0.02)
    assert all(cells[1] == "±0%" for cells in rows(table).values())


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_the_truth_is_within_the_error(
    corpus: Path, tmp_path: Path, small_prep: Prep, tokenizer: Tokenizer, suffix: str
) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    true = {}
    for language in ("sw", "th"):
        with gzip.open(corpus / f"{language}.jsonl.gz") as stream:
            lines = stream.readlines()
        for part in range(3):  # each larger than what is read of it
            data = b"".join(lines[part::3])
            (tmp_path / f"{language}.{part}.jsonl{suffix}").write_bytes(compress(data))
        texts = [json.loads(line)["text"] for line in lines]
        true[language] = int(tokenizer.encode([" ".join(t.split()) for t in texts])[1].sum())
    prep = dataclasses.replace(small_prep, seq_len=512)
    table = estimate_table(find_sources([f"{tmp_path}/*"]), prep, tokenizer, 1, samples=2)
    for language, cells in rows(table).items():
        error = int(re.fullmatch(r"±(\d+)%", cells[1])[1]) / 100
        assert error < 0.3
        assert tokens(cells) == pytest.approx(true[language], rel=max(4 * error, 0.1))


def test_dry_run_writes_nothing(small_prep: Prep, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    words = [f'--prep.input=["{small_prep.input[0]}"]', f"--prep.tokenizer={small_prep.tokenizer}"]
    assert main([*words, f"--prep.output_dir={out}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert len(rows(said)) == 15
    assert "of disk space are needed" in said
    assert not out.exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RunError, match=r"GB free and about 1\d{9}\.\d GB are needed"):
        check_disk(tmp_path, 1 << 60, tokenizer)
    check_disk(tmp_path, 1 << 20, tokenizer)


def test_disk_needed_is_more_than_a_preparation_ever_holds(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    from data_prep import build_shards

    most = 0
    stage = build_shards._Job.stage

    def watched(job, *arguments):
        nonlocal most
        result = stage(job, *arguments)
        folder = job.folder.rglob("*")
        most = max(most, sum(path.stat().st_size for path in folder if path.is_file()))
        return result

    monkeypatch.setattr(build_shards._Job, "stage", watched)
    paths = [corpus / f"{language}.jsonl.gz" for language in ("sw", "th")]
    prepare(input=list(map(str, paths)), seq_len=512, rows_per_block=256)
    text = sum(len(gzip.decompress(path.read_bytes())) for path in paths)
    assert most <= disk_needed(text, 2)
    assert most >= disk_needed(text, 2) / 4
