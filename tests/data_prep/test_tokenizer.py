from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.command import ConfigError
from data_prep.tokenizer import Tokenizer

TEXTS = ["A first text, with some words.", "", "हिन्दी ไทย 中文", "</s> in the text"]


@pytest.fixture
def changed(teacher_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the teacher's tokenizer, with its two files changed by functions."""

    def copy(
        tokenizer: Callable[[Any], object] = lambda _: None,
        config: Callable[[Any], object] = lambda _: None,
    ) -> Path:
        for name, change in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            content = json.loads((teacher_dir / name).read_text())
            change(content)
            (tmp_path / name).write_text(json.dumps(content))
        shutil.copy(teacher_dir / "config.json", tmp_path)
        return tmp_path

    return copy


def test_ids_are_those_of_transformers(teacher_dir: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(teacher_dir)(TEXTS, add_special_tokens=False)
    encoded = tokenizer.encode(TEXTS)
    assert [ids.tolist() for ids in encoded] == expected["input_ids"]
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint16)}


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id) == (0, 2, 1)
    assert tokenizer.vocab_size == 16000


def generic_class(config: Any) -> None:
    # XLMRobertaTokenizer builds its own normaliser; this class takes tokenizer.json as it is
    config.update(tokenizer_class="PreTrainedTokenizerFast")


@pytest.mark.parametrize("config", [lambda _: None, generic_class])
def test_copies_have_one_fingerprint(tokenizer: Tokenizer, changed, config) -> None:
    assert Tokenizer(str(changed(config=config))).fingerprint == tokenizer.fingerprint


def lower(content: Any) -> None:
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [content["normalizer"], {"type": "Lowercase"}],
    }


def swap_two_words(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab[-1][0], vocab[-2][0] = vocab[-2][0], vocab[-1][0]


def add_a_word(content: Any) -> None:
    content["model"]["vocab"].append(["▁quasiantidisestablishmentarianism", -20.0])


@pytest.mark.parametrize("change", [lower, swap_two_words, add_a_word])
def test_what_tokenises_otherwise_has_another_fingerprint(
    tokenizer: Tokenizer, changed, change: Callable[[Any], None]
) -> None:
    folder = changed(change, generic_class)
    assert Tokenizer(str(folder)).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("source", ["missing", "empty", "damaged"])
def test_what_does_not_load_is_named(tmp_path: Path, changed, source: str) -> None:
    folder = tmp_path / "missing"
    if source == "empty":
        folder.mkdir()
    elif source == "damaged":
        folder = changed()
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 5}')
    with pytest.raises(ConfigError, match=f"tokenizer '{folder}' does not load"):
        Tokenizer(str(folder))


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_that_cannot_be_told_from_text_is_refused(changed, pad: str | None) -> None:
    with pytest.raises(ConfigError, match="padding token that is neither"):
        Tokenizer(str(changed(config=lambda content: content.update(pad_token=pad))))


def test_a_tokenizer_that_does_not_frame_a_text_is_refused(changed) -> None:
    folder = changed(
        lambda content: content.update(post_processor=None),
        generic_class,
    )
    with pytest.raises(ConfigError, match=r"frames an empty text as \[\]"):
        Tokenizer(str(folder))
