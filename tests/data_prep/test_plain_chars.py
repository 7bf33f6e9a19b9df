"""Plain characters against the library's normalisers, which are right by definition."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, models, normalizers

from data_prep.plain_chars import plain_chars
from data_prep.word_ids import NORMALIZERS, parts

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@pytest.fixture(scope="module")
def teacher_normalizer(teacher_dir: Path) -> Any:
    return Tokenizer.from_file(str(teacher_dir / "tokenizer.json")).normalizer


def normalizer_of(kind: str, teacher_normalizer: Any) -> Any:
    if kind == "Precompiled":
        return teacher_normalizer
    if kind == "Sequence":
        return normalizers.Sequence([teacher_normalizer, normalizers.Lowercase()])
    return getattr(normalizers, kind)()


def plain_of(normalizer: Any) -> npt.NDArray[np.uint8]:
    tokenizer = Tokenizer(models.BPE())  # whose text says what a normaliser is made of
    tokenizer.normalizer = normalizer
    return plain_chars(parts(json.loads(tokenizer.to_str())["normalizer"]), normalizer)


@pytest.mark.parametrize("kind", sorted({*NORMALIZERS, "Sequence"}))
def test_plain_text_stays_as_it_is(kind: str, teacher_normalizer) -> None:
    normalizer = normalizer_of(kind, teacher_normalizer)
    plain = plain_of(normalizer)
    # `Strip` takes white space off, of which words do not end
    chars = [chr(code) for code in CODES if plain[code] and not chr(code).isspace()]
    assert len(chars) > 300
    rare = [char for char in chars if unicodedata.category(char)[0] in "MC" and char < "\U00020000"]
    common = [char for char in chars if char < "\u3000"]
    draw = random.Random(kind)
    for pool in (chars, common, rare or chars, [*common, *rare] * 2):
        shuffled = draw.sample(pool, len(pool))
        text = "x" + "".join(shuffled[:50_000]) + "x"
        assert normalizer.normalize_str(text) == text


def test_no_character_of_a_key_of_the_map_is_plain(teacher_normalizer) -> None:
    plain = plain_of(teacher_normalizer)
    for code in CODES:
        if code < 0x32000 and teacher_normalizer.normalize_str(chr(code)) != chr(code):
            assert not plain[code], hex(code)
        pair = unicodedata.normalize("NFD", chr(code))
        if len(pair) == 2 and teacher_normalizer.normalize_str(pair) != pair:
            assert not plain[[ord(char) for char in pair]].all(), hex(code)


def test_letters_of_all_scripts_are_plain(teacher_normalizer) -> None:
    plain = plain_of(teacher_normalizer)
    text = "Grüße, the naïve (Łódź) «Привет» Ελλάδα हिन्दी ไทย 한국어 日本語 中文 العربية Việt 👍"
    assert plain[[ord(char) for char in unicodedata.normalize("NFC", text)]].all()
