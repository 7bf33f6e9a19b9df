from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import build_shards
from data_prep.build_shards import build
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import Manifest, ShardReader
from data_prep.verify import find_faults
from tests.data_prep.hostile import Corpus, large_corpus, normal, small_corpus
from tests.data_prep.pieces import Encode, assert_is_made_of, segments_of

SEQ_LEN = 64


@pytest.fixture(scope="module")
def settings(teacher_dir: Path) -> Prep:
    """Under which every document is in the rows once."""
    return Prep(tokenizer=str(teacher_dir), seq_len=SEQ_LEN, smoothing=1.0, heldout_rows=0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Corpus:
    """Everything small; with documents that fill a row, or miss it by a token."""
    random_, fitting = random.Random(5), []
    for size in (SEQ_LEN - 3, SEQ_LEN - 2, SEQ_LEN - 1, 2 * (SEQ_LEN - 2)):
        words = [f"fit{size}"]
        while len(encode(" ".join(words))) < 2 * size:
            words.append(random_.choice(["on", "and", "the", "is", "to"]))
        fitting.append(" ".join(words))
        assert len(encode(fitting[-1])) == 2 * size
    return small_corpus(tmp_path_factory.mktemp("hostile") / "in", fitting)


@pytest.fixture(scope="module")
def small_units() -> Any:
    """Units of ten kilobytes, so that ranks share each file, and many partitions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_shards, "MIB", 10_000)
        yield


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, settings: Prep, small_units: None) -> tuple[Path, Manifest]:
    """By one rank; do not write into the folder."""
    folder = corpus.folder.parent / "out"
    prep = dataclasses.replace(settings, input=[f"{corpus.folder}/*"], output_dir=str(folder))
    build(PrepRecipe(prep=prep), OneRank())
    return folder, ShardReader(str(folder)).manifest


def test_every_character_and_document_is_accounted_for(
    corpus: Corpus, prepared: tuple[Path, Manifest], encode: Encode
) -> None:
    accounting, _ = corpus.outcome(encode)
    found = {
        language: {what: number for what, number in counts.items() if number}
        for language, counts in prepared[1].accounting.items()
    }
    assert found == accounting
    for counts in found.values():
        for what in ("chars", "documents"):
            total = sum(n for key, n in counts.items() if key.startswith(f"{what}_"))
            assert total == 2 * counts[f"{what}_in"]


def test_every_document_is_wholly_in_the_rows(
    corpus: Corpus, prepared: tuple[Path, Manifest], encode: Encode
) -> None:
    _, documents = corpus.outcome(encode)
    assert_is_made_of(
        {language: [encode(text) for text in texts] for language, texts in documents.items()},
        segments_of(prepared[0]),
    )


def test_the_pieces_of_this_test_tell_what_is_missing() -> None:
    whole, parts = b"aabbccddeeff", [b"aabb", b"aabbcc", b"ccdd", b"eeff"]
    assert_is_made_of({"x": [whole, b"aabbcc"]}, {"x": parts})
    for wrong in (parts[1:], [*parts, b"aabb"], [*parts[:3], b"ffee"]):
        with pytest.raises(AssertionError):
            assert_is_made_of({"x": [whole, b"aabbcc"]}, {"x": wrong})


def test_faults_are_listed_with_their_file_and_reason(
    corpus: Corpus, prepared: tuple[Path, Manifest]
) -> None:
    assert_lists_faults(prepared[0], corpus)


def assert_lists_faults(folder: Path, corpus: Corpus) -> None:
    lines = (folder / "faults.jsonl").read_text().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        fault = json.loads(line)
        assert set(fault) == {"url", "offset", "reason", "bytes"}
        found.setdefault(Path(fault["url"]).name, []).append(fault["reason"])
    assert found.keys() == corpus.faulty.keys()
    for name, reasons in corpus.faulty.items():
        for said, reason in zip(found[name], reasons, strict=True):
            assert reason in said, name


def test_it_verifies(prepared: tuple[Path, Manifest]) -> None:
    assert not list(find_faults(prepared[0]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_share_files_give_the_same_bytes(
    on_ranks, corpus: Corpus, prepared, settings: Prep, tmp_path: Path, digests, size: int
) -> None:
    prep = dataclasses.replace(
        settings, input=[f"{corpus.folder}/*"], output_dir=str(tmp_path / "out")
    )
    assert on_ranks(size, lambda ranks: build(PrepRecipe(prep=prep), ranks)) == [None] * size
    assert digests(tmp_path / "out") == digests(prepared[0])


def test_other_folders_and_another_order_give_the_same_bytes(
    corpus: Corpus, prepared, settings: Prep, tmp_path: Path, digests
) -> None:
    folders = []
    for number, path in enumerate(sorted(corpus.folder.iterdir(), reverse=True)):
        if path.name != "loop":
            (folder := tmp_path / f"{number:03}").mkdir()
            (folder / path.name).symlink_to(path)
            folders.append(f"{folder}/*")
    prep = dataclasses.replace(settings, input=folders, output_dir=str(tmp_path / "out"))
    build(PrepRecipe(prep=prep), OneRank())
    here, there = digests(prepared[0]), digests(tmp_path / "out")
    del here["faults.jsonl"], there["faults.jsonl"]  # names the folders
    assert there == here


# What a process used, by one in between: a child's peak begins with that of who started it.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


def test_bombs_and_a_line_of_50_mb_take_bounded_memory(
    repo: Path, settings: Prep, encode: Encode, tmp_path: Path
) -> None:
    words, line = long_line(repo)
    corpus = large_corpus(tmp_path / "in", line)
    out = tmp_path / "out"
    command = [
        *("--prep.input", f"[{corpus.folder}/*]", "--prep.output_dir", str(out)),
        *("--prep.tokenizer", str(settings.tokenizer), "--prep.smoothing", "1"),
    ]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "data_prep.build_shards", *command],
        cwd=repo,
        stdout=subprocess.PIPE,
        timeout=600,
        check=True,
    )
    kib, seconds = map(float, measured.stdout.split())
    assert kib < 1.5e6
    assert seconds < 60
    accounting, _ = corpus.outcome(len)
    assert ShardReader(str(out)).manifest.accounting == accounting
    assert_lists_faults(out, corpus)
    assert_is_made_of({"long": [ids_of_words(words, encode)]}, segments_of(out))
    assert not list(find_faults(out))


def long_line(repo: Path) -> tuple[Sequence[str], str]:
    lines = (repo / "recipes" / "demo_text" / "en.jsonl").read_text(encoding="utf-8").splitlines()
    known = sorted({word for line in lines for word in normal(json.loads(line)["text"]).split()})
    draw = np.random.default_rng(3).integers(len(known), size=8_500_000)
    words = np.array(known, dtype=object)[draw].tolist()
    line = " ".join(words)
    assert len(line.encode()) > 50_000_000
    return words, line


def ids_of_words(words: Sequence[str], encode: Encode) -> bytes:
    """Of the words in a line: this tokenizer looks at each alone, as the first of them tell."""
    ids = {word: encode(word) for word in set(words)}
    few = words[:20_000]
    assert b"".join(ids[w] for w in few) == encode(" ".join(few))
    return b"".join(ids[word] for word in words)
