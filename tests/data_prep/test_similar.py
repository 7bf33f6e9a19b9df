from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import normalise
from data_prep.command import ConfigError
from data_prep.shingles import shingles
from data_prep.similar import (
    SHINGLE_WORDS,
    SHORTEST_LINE,
    SIGNATURE,
    SURE,
    bands_and_rows,
    line_hashes,
    near_duplicate_bands,
)

LINE = "a line of some length"
CRC = 1647006342


@given(st.lists(st.text("ab漢 ", max_size=30)))
def test_lines_have_equal_hashes_where_they_are_equal(lines: list[str]) -> None:
    hashes = line_hashes("\n".join(lines))
    lines = lines or [""]
    assert hashes.dtype == np.uint64
    assert len(hashes) == len(lines)
    for (hash_a, a), (hash_b, b) in itertools.combinations(zip(hashes, lines, strict=True), 2):
        counts = len(a) >= SHORTEST_LINE and len(b) >= SHORTEST_LINE
        assert not counts or (hash_a == hash_b) == (a == b)
    assert [int(h) == 0 for h in hashes] == [len(line) < SHORTEST_LINE for line in lines]


def test_hashes_are_the_same_in_any_process_and_release() -> None:
    # These values stand in spilled files, which a restart reads.
    code = (
        "from data_prep.similar import *;"
        f"print(line_hashes({LINE!r}).tolist(), near_duplicate_bands([{LINE!r}], 0.97).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    here = [line_hashes(LINE).tolist(), near_duplicate_bands([LINE], 0.97).tolist()]
    assert printed.strip() == " ".join(map(str, here))
    assert zlib.crc32(printed.encode()) == CRC


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_find_a_pair_at_the_threshold_and_few_below(threshold: float) -> None:
    bands, rows = bands_and_rows(threshold)
    assert bands * rows <= SIGNATURE
    chance = 1 - (1 - threshold**rows) ** bands
    assert chance >= SURE
    if rows < SIGNATURE:
        fewer = SIGNATURE // (rows + 1)
        assert 1 - (1 - threshold ** (rows + 1)) ** fewer < SURE


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[str]:
    """Of every language: some with spaces, some without."""
    texts = []
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path) as lines:
            found = [normalise(json.loads(line)["text"]) for line in lines]
        texts += [text[:4000] for text in found if len(text) > 1500][:8]
    return texts


def jaccard(left: str, right: str) -> float:
    a, b = (set(shingles(text, SHINGLE_WORDS).tolist()) for text in (left, right))
    return len(a & b) / len(a | b)


def is_near(keys: np.ndarray, left: int, right: int) -> bool:
    return bool((keys[left] == keys[right]).any())


def edited(text: str, share: float, rng: random.Random) -> str:
    """With some of its pieces of 40 characters put for others."""
    pieces = [text[i : i + 40] for i in range(0, len(text), 40)]
    for i in rng.sample(range(len(pieces)), round(share * len(pieces))):
        pieces[i] = pieces[i][::-1]
    return "".join(pieces)


def test_edited_documents_are_found_by_their_exact_similarity(documents: list[str]) -> None:
    """Found as often as the S-curve says, at each similarity."""
    rng = random.Random(5)
    threshold = 0.8
    bands, rows = bands_and_rows(threshold)
    pairs = []
    for text in documents:
        for share in (0.01, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5):
            pairs += [text, edited(text, share, rng)]
    keys = near_duplicate_bands(pairs, threshold)
    assert keys.shape == (len(pairs), bands)
    similar, below, far = [], [], []
    expected = found = 0.0
    for i in range(0, len(pairs), 2):
        s = jaccard(pairs[i], pairs[i + 1])
        hit = is_near(keys, i, i + 1)
        expected += 1 - (1 - s**rows) ** bands
        found += hit
        (similar if s >= threshold else far if s < 0.5 else below).append(hit)
    assert min(len(similar), len(below), len(far)) > 100
    assert np.mean(similar) > 0.95
    assert np.mean(far) < 0.05
    assert abs(found - expected) < 0.04 * len(pairs) / 2


def test_different_documents_are_not_taken_for_each_other(documents: list[str]) -> None:
    keys = near_duplicate_bands(documents, 0.8)
    for a, b in itertools.combinations(range(len(documents)), 2):
        if is_near(keys, a, b):
            assert jaccard(documents[a], documents[b]) > 0.5


def test_keys_do_not_depend_on_the_batch(documents: list[str]) -> None:
    together = near_duplicate_bands(documents[:20], 0.7)
    alone = [near_duplicate_bands([text], 0.7)[0] for text in documents[:20]]
    np.testing.assert_array_equal(together, alone)
    assert near_duplicate_bands([], 0.7).shape == (0, bands_and_rows(0.7)[0])


def test_texts_shorter_than_a_run_are_compared_as_wholes() -> None:
    texts = ["a b c", "A, b: c!", "a b d", "!!!", "???", "!!!", "", "漢字", "漢"]
    keys = near_duplicate_bands(texts, 0.8)
    near = {(i, j) for i, j in itertools.combinations(range(9), 2) if is_near(keys, i, j)}
    assert near == {(0, 1), (3, 5)}


def test_equal_texts_are_near_at_any_threshold(documents: list[str]) -> None:
    for threshold in (0.1, 0.5, 1.0):
        keys = near_duplicate_bands([documents[0], documents[0]], threshold)
        assert (keys[0] == keys[1]).all()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"pip install rensa==0\.5\.0"):
        near_duplicate_bands(["a"], 0.8)
