from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.command import ConfigError
from data_prep.tokenizer import Tokenizer
from data_prep.word_ids import UnsupportedError, WordIds

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
    ids, lengths = tokenizer.encode(TEXTS)
    assert ids.tolist() == list(itertools.chain(*expected["input_ids"]))
    assert lengths.tolist() == [len(of_text) for of_text in expected["input_ids"]]
    assert (ids.dtype, lengths.dtype) == (np.dtype(np.uint16), np.dtype(np.int64))


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


SENTENCE_ENDS = ". ! ? … 。 ！ ？ । ۔ ؟ ። ។ ॥".split()


def trained(tmp_path: Path, kind: str) -> Path:
    """The folder of a small tokenizer of a kind, of which every word of a sentence is a piece."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    text = "Ein Haus steht. Sind Häuser da? Haustür " + " ".join(SENTENCE_ENDS) + ' da." da.) a.b'
    if kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    elif kind == "bpe":
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        backend = Backend(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=special)
    backend.train_from_iterator([text] * 5, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    return tmp_path


def pieces(tokenizer: Tokenizer, flags: np.ndarray) -> set[str]:
    ids = tokenizer._backend.get_vocab()
    assert flags.shape == (tokenizer.vocab_size,)
    assert flags.dtype == np.bool_
    return {piece for piece, id_ in ids.items() if flags[id_]}


def test_where_the_teachers_words_and_sentences_are(tokenizer: Tokenizer) -> None:
    starts = pieces(tokenizer, tokenizer.starts_word)
    assert {"▁", "▁de"} <= starts
    assert not {"s", ",", "<s>", "<mask>"} & starts
    ends = pieces(tokenizer, tokenizer.ends_sentence)
    assert {".", "?", "!", "。", "।", "۔", "؟", '."', ".)"} <= ends
    assert not {",", ":", "▁", "s", "<s>", "<mask>"} & ends


@pytest.mark.parametrize(
    ("kind", "start", "inside"),
    [("wordpiece", "haus", "##r"), ("bpe", "ĠHaus", "u"), ("words", "Haus", "")],
)
def test_words_of_other_kinds(tmp_path: Path, kind: str, start: str, inside: str) -> None:
    tokenizer = Tokenizer(str(trained(tmp_path, kind)))
    starts = pieces(tokenizer, tokenizer.starts_word)
    assert {piece.lower() for piece in starts} >= {start.lower()}
    assert inside not in starts
    assert {"Ċ", "ĉ"} <= starts or kind != "bpe"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "words"])
@pytest.mark.parametrize("end", SENTENCE_ENDS)
def test_sentences_of_other_kinds(tmp_path: Path, kind: str, end: str) -> None:
    tokenizer = Tokenizer(str(trained(tmp_path, kind)))
    ids, _ = tokenizer.encode([f"Haus {end}"])
    last = tokenizer._backend.id_to_token(int(ids[-1]))
    # A byte-level vocabulary may hold the end of one only in parts.
    in_parts = kind == "bpe" and len(ids) > 2
    assert tokenizer.ends_sentence[ids[-1]] or in_parts, last
    assert not tokenizer.ends_sentence[ids[0]]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "words"])
def test_ids_of_other_kinds(tmp_path: Path, kind: str, capsys) -> None:
    folder = trained(tmp_path, kind)
    ids, lengths = Tokenizer(str(folder)).encode(TEXTS)
    expected = PreTrainedTokenizerFast.from_pretrained(folder)(TEXTS, add_special_tokens=False)
    assert ids.tolist() == list(itertools.chain(*expected["input_ids"]))
    assert lengths.tolist() == [len(of_text) for of_text in expected["input_ids"]]
    warned = capsys.readouterr().err
    why = "several times slower than it might: no code is here for WordLevel after WhitespaceSplit"
    assert (why in warned) == (kind == "words")
    assert warned.count("\n") == (kind == "words")


def astray(words: WordIds, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """As the fast way, but for one word."""
    ids, lengths = encode(words, texts)
    for text, end in zip(texts, np.cumsum(lengths), strict=True):
        if "astray" in text:
            ids[end - 1] += 1
    return ids, lengths


encode = WordIds.encode


@pytest.mark.parametrize(("place", "falls_back"), [(0, True), (30, True), (99, False)])
def test_other_ids_than_the_librarys_end_the_fast_way(
    teacher_dir: Path, tokenizer: Tokenizer, monkeypatch, capsys, place: int, falls_back: bool
) -> None:
    monkeypatch.setattr(WordIds, "encode", astray)
    texts = ["word " * 400] * 100
    texts[place] = "this goes astray"
    suspect = Tokenizer(str(teacher_dir))
    ids, _ = suspect.encode(texts)
    warned = capsys.readouterr().err
    right = np.concatenate([tokenizer._encode_slowly([text])[0] for text in texts])
    assert np.array_equal(ids, right) == falls_back  # behind the sample, nobody looks
    if falls_back:
        assert warned == (
            f"warning: the fast ids of {str(teacher_dir)!r} differ from those of tokenizers in "
            f"text {place + 1} of this process's texts, counted from 1, so all is encoded by "
            "tokenizers, several times slower; please report it\n"
        )


def test_other_ids_of_the_probe_end_the_fast_way(teacher_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.tokenizer.PROBE", ("fine", "astray"))
    monkeypatch.setattr(WordIds, "encode", astray)
    warnings: list[str] = []
    tokenizer = Tokenizer(str(teacher_dir), warn=warnings.append)
    (warning,) = warnings
    assert "in text 2 of the probe's text" in warning
    assert (
        tokenizer.encode(["astray"])[0].tolist() == tokenizer._encode_slowly(["astray"])[0].tolist()
    )


def test_no_compiler_is_slow_and_right(teacher_dir: Path, tokenizer, monkeypatch) -> None:
    def refuse() -> None:
        raise UnsupportedError("there is no C compiler")

    monkeypatch.setattr("data_prep.word_ids._library", refuse)
    warnings: list[str] = []
    slow = Tokenizer(str(teacher_dir), warn=warnings.append)
    assert "slower than it might: there is no C compiler" in warnings[0]
    for one, other in zip(slow.encode(TEXTS), tokenizer.encode(TEXTS), strict=True):
        assert np.array_equal(one, other)
        assert one.dtype == other.dtype
