from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

from data_prep.command import ConfigError
from pipeline.trimmed_tokenizer import kept_ids, trimmed_content, trimmed_tokenizer

KINDS = ("unigram", "bytes_unigram", "bpe", "prefixed_bpe", "wordpiece", "late_wordpiece")
each_kind = pytest.mark.parametrize("kind", KINDS)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


@pytest.fixture(scope="session")
def texts(repo: Path) -> list[str]:
    """Lines of the demo text in six scripts, and what no corpus holds."""
    lines = ["", " ", "zz qqxx", "\u16a0\u16b1 runes", "a<mask>b <s> </s>", "naïve №5  12,345!"]
    for language in ("de", "en", "ru", "th", "zh", "hi", "ar"):
        path = repo / "recipes" / "demo_text" / f"{language}.jsonl"
        lines += [json.loads(line)["text"] for line in path.read_text().splitlines()[:12]]
    return lines


@pytest.fixture(scope="session")
def folders(
    repo: Path,
    pocket_teacher: Path,
    bert_tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Saved tokenizers of each kind."""
    german = str(repo / "recipes" / "demo_text" / "de.jsonl")

    def save(name: str, tokenizer: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        return folder

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        [german],
        trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))

    prefixed = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    prefixed.pre_tokenizer = pre_tokenizers.Whitespace()
    prefixed.decoder = decoders.WordPiece(prefix="##")
    prefixed.train(
        [german],
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, continuing_subword_prefix="##"),
    )
    frame = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    prefixed.add_special_tokens(["<end>"])
    prefixed.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>",
        special_tokens=[("<s>", 0), ("<end>", prefixed.token_to_id("<end>"))],
    )

    spelling = ["▁d", "er", "e", "r", "d", "▁", *"<0x123456789ABCDEF>"]
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(token, -float(i)) for i, token in enumerate(dict.fromkeys(spelling))]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    fallback = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    fallback.post_processor = frame
    # As BERT's own: special tokens behind such as no text gives, here the padding too.
    trained = json.loads((bert_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(trained, key=lambda token: trained[token])
    unused = [f"unused{letter}" for letter in "abcdefghi"]
    order = [*unused[:3], words[0], *unused[3:], *words[1:]]
    ids = {token: id_ for id_, token in enumerate(order)}
    late = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    late.normalizer = normalizers.BertNormalizer()
    late.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    late.decoder = decoders.WordPiece()
    late.post_processor = processors.Sequence(
        [
            processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])),
            processors.ByteLevel(),  # holds no ids
        ]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    named = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return {
        "late_wordpiece": save("late", PreTrainedTokenizerFast(tokenizer_object=late, **named)),
        "unigram": pocket_teacher,
        "bytes_unigram": save("bytes", PreTrainedTokenizerFast(tokenizer_object=fallback, **NAMES)),
        "bpe": save("bpe", RobertaTokenizerFast(tokenizer_object=bpe, **NAMES)),
        "prefixed_bpe": save(
            "prefixed", PreTrainedTokenizerFast(tokenizer_object=prefixed, **NAMES)
        ),
        "wordpiece": bert_tokenizer,
    }


class Trimmed:
    """A tokenizer, and what is left of it with a random share of its tokens."""

    def __init__(self, folder: Path, share: float, seed: int, saved: Path) -> None:
        self.whole = AutoTokenizer.from_pretrained(folder)
        num_ids = max(self.whole.get_vocab().values()) + 1
        wanted = np.random.default_rng(seed).random(num_ids) < share
        self.kept = kept_ids(self.whole, wanted)
        trimmed_tokenizer(self.whole, self.kept).save_pretrained(saved)
        self.tokenizer = AutoTokenizer.from_pretrained(saved)
        self.wanted = set(np.flatnonzero(wanted).tolist())
        self.new = {old: new for new, old in enumerate(self.kept.tolist())}


@pytest.fixture
def trim(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Trimmed]:
    return lambda kind, share=0.3, seed=0: Trimmed(
        folders[kind], share, seed, tmp_path / f"{kind}-{share}-{seed}"
    )


@each_kind
def test_text_of_kept_tokens_is_tokenised_as_before(
    kind: str, trim: Callable[..., Trimmed], texts: list[str]
) -> None:
    words = {word for text in texts for word in text.split()} | set(texts)
    num_equal = 0
    for share, seed in itertools.product((0.2, 0.6, 0.95), range(2)):
        trimmed = trim(kind, share, seed)
        for text in words:
            ids = trimmed.whole(text)["input_ids"]
            if trimmed.new.keys() >= set(ids):
                assert trimmed.tokenizer(text)["input_ids"] == [trimmed.new[i] for i in ids], text
                num_equal += 1
    assert num_equal > len(words)


@each_kind
def test_other_text_is_spelt_by_kept_tokens(
    kind: str, trim: Callable[..., Trimmed], texts: list[str]
) -> None:
    trimmed = trim(kind, share=0.1)
    whole, part = trimmed.whole, trimmed.tokenizer
    num_respelt = 0
    for text in texts:
        before, after = whole(text)["input_ids"], part(text)["input_ids"]
        num_respelt += len(after) > len(before)
        assert part.decode(after) == whole.decode(before), text
        assert after.count(part.unk_token_id) == before.count(whole.unk_token_id), text
    assert num_respelt > (5 if kind != "bytes_unigram" else 0)


@each_kind
def test_kept_tokens_have_their_old_order_and_special_ones_their_place(
    kind: str, trim: Callable[..., Trimmed]
) -> None:
    trimmed = trim(kind)
    whole, part = trimmed.whole, trimmed.tokenizer
    assert len(part) == len(trimmed.kept) < len(whole)
    names = whole.convert_ids_to_tokens(trimmed.kept.tolist())
    assert part.convert_ids_to_tokens(list(range(len(names)))) == names
    assert set(trimmed.kept.tolist()) >= trimmed.wanted & set(whole.get_vocab().values())
    assert part.pad_token_id == whole.pad_token_id
    assert part.special_tokens_map == whole.special_tokens_map
    for old in whole.all_special_ids:
        assert part.convert_tokens_to_ids(whole.convert_ids_to_tokens(old)) == trimmed.new[old]
    assert part("")["input_ids"] == [trimmed.new[i] for i in whole("")["input_ids"]]


@each_kind
def test_all_tokens_trimmed_to_all_are_the_same_tokenizer(
    kind: str, trim: Callable[..., Trimmed], texts: list[str]
) -> None:
    trimmed = trim(kind, share=1.1)
    assert trimmed.tokenizer.get_vocab() == trimmed.whole.get_vocab()
    assert trimmed.tokenizer(texts)["input_ids"] == trimmed.whole(texts)["input_ids"]


def test_characters_are_kept_whoever_uses_them(trim: Callable[..., Trimmed]) -> None:
    trimmed = trim("unigram", share=0)
    characters = {token for token in trimmed.whole.get_vocab() if len(token) == 1}
    assert len(characters) > 500
    kept = set(trimmed.tokenizer.get_vocab())
    assert characters <= kept
    others = kept - characters - set(trimmed.whole.all_special_tokens)
    assert len(others) == 1  # the lowest score
    bytes_ = trim("bytes_unigram", share=0).tokenizer.get_vocab()
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(bytes_)


def test_a_token_without_the_characters_to_spell_it_is_kept() -> None:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a", "##b", "ab", "ac", "##cb"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
    kept = kept_ids(fast, np.zeros(len(vocabulary), dtype=bool))
    assert fast.convert_ids_to_tokens(kept.tolist()) == [*SPECIAL, "a", "##b", "ac", "##cb"]


def test_all_that_makes_a_bpe_token_is_kept() -> None:
    """Also where two merges make the same token."""
    letters = ["a", "b", "c", "d"]
    vocabulary = [*SPECIAL, *letters, "ab", "bc", "abc", "cd"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("c", "d")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(ids, merges)), **NAMES)
    wanted = np.zeros(len(vocabulary), dtype=bool)
    wanted[ids["abc"]] = True
    kept = kept_ids(fast, wanted)
    expected = [*SPECIAL, *letters, "ab", "bc", "abc"]
    assert fast.convert_ids_to_tokens(kept.tolist()) == expected
    trimmed = json.loads(trimmed_tokenizer(fast, kept).backend_tokenizer.to_str())
    assert trimmed["model"]["merges"] == [list(pair) for pair in merges[:-1]]


def test_added_tokens_are_written_with_their_new_ids(folders: dict[str, Path]) -> None:
    """The library numbers them itself when it reads the file; others go by what is written."""
    whole = AutoTokenizer.from_pretrained(folders["prefixed_bpe"])
    whole.add_tokens(["<new>"], special_tokens=True)
    kept = kept_ids(whole, np.zeros(len(whole), dtype=bool))
    assert len(kept) < len(whole)
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    written = trimmed_content(json.loads(whole.backend_tokenizer.to_str()), new_ids)
    assert {"id": len(kept) - 1, "content": "<new>"}.items() <= written["added_tokens"][-1].items()
    part = trimmed_tokenizer(whole, kept)
    assert part("a<new>")["input_ids"][-2] == len(kept) - 1


def test_what_cannot_be_trimmed_is_refused() -> None:
    ids = {token: i for i, token in enumerate(SPECIAL)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **NAMES)
    with pytest.raises(ConfigError, match=r"cannot trim a WordLevel tokenizer.*vocabulary=full"):
        kept_ids(fast, np.ones(5, dtype=bool))
    bpe = Tokenizer(models.BPE(ids, []))
    without = {name: token for name, token in NAMES.items() if name != "unk_token"}
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **without)
    with pytest.raises(ConfigError, match="BPE tokenizer whose unknown token is None"):
        kept_ids(fast, np.ones(5, dtype=bool))
