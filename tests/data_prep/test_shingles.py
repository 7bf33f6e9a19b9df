from __future__ import annotations

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shingles import shingles, whole

TEXT = st.text(
    st.sampled_from("abAB1 ,.-\u0301é漢字の\u0e01\u0e34\U00020000\U0001f600\u200d\n"), max_size=80
)


def quarters(character: str) -> int:
    name = unicodedata.name(character)
    if name.startswith("THAI"):
        return 1
    return 2 if name.startswith(("CJK UNIFIED", "HIRAGANA")) else 4


def units(text: str) -> list[tuple[str, int]]:
    """Words and lone characters, and as how many quarter words they count."""
    found: list[tuple[str, int]] = []
    word = ""
    for character in [*text, " "]:
        is_letter = unicodedata.category(character)[0] in "LMN"
        if is_letter and quarters(character) == 4:
            word += character.lower()
            continue
        if word:
            found.append((word, 4))
            word = ""
        if is_letter:
            found.append((character, quarters(character)))
    return found


def runs(text: str, words: int) -> list[tuple[str, ...]]:
    found = units(text)
    out = []
    for begin in range(len(found)):
        length, stop = 0, begin
        while length < 4 * words and stop < len(found):
            length += found[stop][1]
            stop += 1
        if length >= 4 * words:
            out.append(tuple(unit for unit, _ in found[begin:stop]))
    return out


@given(TEXT, TEXT, st.integers(1, 6))
def test_hashes_are_equal_where_runs_are_and_nowhere_else(left: str, right: str, words: int):
    hashes = np.concatenate([shingles(left, words), shingles(right, words)]).tolist()
    expected = [*runs(left, words), *runs(right, words)]
    assert len(hashes) == len(expected)
    assert len(set(hashes)) == len(set(expected)) == len(set(zip(hashes, expected, strict=True)))


@given(TEXT, TEXT)
def test_whole_is_equal_where_all_words_are(left: str, right: str) -> None:
    assert len(whole(left)) == min(1, len(units(left)))
    assert (whole(left).tolist() == whole(right).tolist()) == (units(left) == units(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("The cat, the CAT", "the cat the cat"),
        ("«Ça va?»", "ça va"),
        ("ΣΟΦΟΣ", "σοφοσ"),
        ("हिन्दी है।", "हिन्दी है"),
        ("漢字、かな。", "漢字かな"),
        ("漢字 abc", "漢字abc"),
        ("٣ شيء", "٣ شيء"),
    ],
)
def test_case_and_punctuation_do_not_count(left: str, right: str) -> None:
    assert whole(left) == whole(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [("ab c", "a bc"), ("abc", "ab c"), ("a b", "b a"), ("किताब", "कताब"), ("ก", "กิ"), ("1", "2")],
)
def test_letters_order_marks_and_word_ends_count(left: str, right: str) -> None:
    assert whole(left) != whole(right)


def test_a_text_longer_than_the_powers_that_are_kept() -> None:
    text = " ".join(f"w{i}" for i in range(40_000))
    tail = " ".join(f"w{i}" for i in range(39_000, 40_000))
    assert shingles(text, 13)[39_000:].tolist() == shingles(tail, 13).tolist()
    assert len(set(shingles(text, 13).tolist())) == 40_000 - 12


def test_hashes_are_the_same_in_any_process_and_release() -> None:
    # These values stand in spilled files, which a restart reads.
    code = "from data_prep.shingles import shingles; print(shingles('One, two 漢字', 2).tolist())"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(shingles("One, two 漢字", 2).tolist()) == EXPECTED


EXPECTED = "[13654318934430067454, 154344640389373364]"
