"""Ids of text at several times the speed of `tokenizers`, word by word, and the very same ids.

The tokenizers of multilingual encoders look at one word at a time, where a word is white space and
what follows it. So a word has the same ids wherever it stands, and those of words met before are
looked up. New words are normalised by the tokenizer's own normaliser and go through its model in
C, which is compiled at first use. docs/tokenising.md says which tokenizers this holds for, and why.
"""

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.compiled import UncompiledError, compile_library
from data_prep.plain_chars import ALONE, NUM_CODE_POINTS, SEPARATOR, plain_chars

FLAGS = "-O3 -march=native".split()
SOURCE = Path(__file__).parent / "native" / "word_ids.c"
SPACE = "\u2581"
NORMALIZED_CHARS = 1 << 20  # at a time: the library's normaliser takes some forty bytes for each
LONGEST_PIECE = 0xFFFF  # bytes; as in native/unigram.h
BETWEEN_LETTERS = re.compile(f"(?<=[{ALONE}])(?=[{ALONE}])")
PLANES_WITH_KINDS = 0x40000  # no code point above is a letter, a number, white space, punctuation
OTHER, LETTER, NUMBER, WHITE = range(4)  # as in native/bpe.h

# What these do to a character does not depend on what stands beyond white space.
NORMALIZERS = {
    *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
    *("StripAccents", "Strip"),
}
# Of those, what neither makes spaces nor takes white space away.
SPACE_KEEPING = {"Lowercase", "NFC", "NFD"}


class UnsupportedError(Exception):
    """There is no fast way for this tokenizer, or not here; says why."""


class WordIds:
    """The ids of texts, without special tokens around them.

    Args:
        backend: a tokenizer of the `tokenizers` library, without truncation and padding.
        content: its tokenizer.json.

    Raises:
        UnsupportedError: its ids may depend on more than a word, there is no code for its model,
            or the code does not compile here.
    """

    def __init__(self, backend: Any, content: Mapping[str, Any]) -> None:
        added = content["added_tokens"]
        if content["normalizer"] and any(token["normalized"] for token in added):
            raise UnsupportedError("it looks for added tokens in normalised text")
        contents = [re.escape(token["content"]) for token in added]
        self._separate = re.compile("|".join([SEPARATOR, *contents]))
        self._first_chars = {SEPARATOR, *(token["content"][0] for token in added)}
        self._backend, self._normalizer = backend, backend.normalizer
        self._library = library = _library()
        kind, model = _model(library, content)
        self._model = ctypes.c_void_p(model)
        weakref.finalize(self, library[f"{kind}_free"], self._model)
        self._learn = library[f"{kind}_learn"]
        first = parts(content["pre_tokenizer"])[0]
        self._adds_space = first["type"] == "ByteLevel" and first["add_prefix_space"]
        self._plain_chars = plain_chars(parts(content["normalizer"]), self._normalizer)
        self._words = ctypes.c_void_p(library.words_new(_at(self._plain_chars)))
        weakref.finalize(self, library.words_free, self._words)

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of the texts.

        Args:
            texts: of any length.

        Returns:
            uint32 [total], the ids of all texts end to end, and int64 [texts], how many each has.
        """
        special = [index for index, text in enumerate(texts) if self._is_special(text)]
        if not special:
            return self._encode_plain(texts)
        plain = list(texts)
        for index in special:
            plain[index] = ""
        ids, lengths = self._encode_plain(plain)
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        for index in special:
            encoding = self._backend.encode(texts[index], add_special_tokens=False)
            parts[index] = np.array(encoding.ids, np.uint32)
            lengths[index] = len(parts[index])
        return np.concatenate(parts), lengths

    def _is_special(self, text: str) -> bool:
        """Whether the text spells an added token, which comes before words, or the separator."""
        seen = any(char in text for char in self._first_chars)
        return seen and self._separate.search(text) is not None

    def _lead(self, text: str) -> str:
        """What the pre-tokenizer puts before a text."""
        return " " if self._adds_space and text[:1] not in ("", " ") else ""

    def _encode_plain(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        data = [(self._lead(text) + text).encode() for text in texts]
        ends = np.cumsum([len(encoded) for encoded in data], dtype=np.int64)
        joined = b"".join(data)
        del data
        lengths = np.zeros(len(texts), np.int64)
        num_texts = ctypes.c_int64(len(texts))
        missing, num_bytes, used = ctypes.c_void_p(), ctypes.c_int64(), ctypes.c_int64()
        found = ctypes.byref(missing), ctypes.byref(num_bytes)
        out = None
        self._library.words_begin(self._words)
        while self._library.words_find(self._words, joined, _at(ends), num_texts, *found):
            new = ctypes.string_at(missing, num_bytes.value) if num_bytes.value else b""
            if new:
                new = self._normalize(new.decode())
            self._learn(self._words, self._model, new, ctypes.c_int64(len(new)))
            out = self._library.words_put(self._words, _at(lengths), ctypes.byref(used))
        if not used.value:
            return np.empty(0, np.uint32), lengths
        return np.ctypeslib.as_array(out, (used.value,)).copy(), lengths

    def _normalize(self, text: str) -> bytes:
        """Normalised text in UTF-8; a long one in parts, as the library takes much memory."""
        parts, start = [], 0
        while start < len(text):
            between = BETWEEN_LETTERS.search(text, start + NORMALIZED_CHARS)
            stop = between.start() if between else len(text)
            parts.append(self._normalizer.normalize_str(text[start:stop]).encode())
            start = stop
        return b"".join(parts)


def _model(library: ctypes.CDLL, content: Mapping[str, Any]) -> tuple[str, int]:
    """What C calls the kind of model, and where its vocabulary lies there."""
    pre_tokenizers = parts(content["pre_tokenizer"])
    normalizers = parts(content["normalizer"])
    for part in normalizers:
        if part["type"] not in NORMALIZERS and not _replaces_spaces(part):
            raise UnsupportedError(f"its normaliser {part['type']} may look beyond a word")
    keeps_space = {part["type"] for part in normalizers} <= SPACE_KEEPING
    kinds = [content["model"]["type"], *(part["type"] for part in pre_tokenizers)]
    match kinds:
        case ["Unigram", "WhitespaceSplit", "Metaspace"]:
            return "unigram", _unigram(library, content["model"], pre_tokenizers[1])
        case ["WordPiece", "BertPreTokenizer"]:
            return "wordpiece", _wordpiece(library, content["model"])
        case ["BPE", "ByteLevel"] if keeps_space:
            return "bpe", _bpe(library, content["model"], pre_tokenizers[0])
    raise UnsupportedError(f"no code is here for {' after '.join(kinds)} and its normaliser")


def parts(of: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normaliser or pre-tokenizer of a tokenizer.json as the sequence of what it does."""
    if of is None:
        return []
    if of["type"] != "Sequence":
        return [of]
    return [
        part for inner in of.get("normalizers", of.get("pretokenizers")) for part in parts(inner)
    ]


def _replaces_spaces(part: Mapping[str, Any]) -> bool:
    """Whether a normaliser makes one space of several, as converted SentencePiece models do."""
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    return dict(part) == spaces


def _check_options(options: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse a part of a tokenizer with any option but those that are known to change nothing.

    Args:
        options: of the part, those that vary left out.
        plain: the values that they have here.
    """
    for name, value in options.items():
        if name not in plain or value != plain[name]:
            raise UnsupportedError(f"no code is here for its option {name}={value!r}")


def _unigram(library: ctypes.CDLL, model: Mapping[str, Any], metaspace: Mapping[str, Any]) -> int:
    vocab, unk_id = model["vocab"], model["unk_id"]
    plain = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    _check_options(metaspace, plain)
    _check_options(
        model, {"type": "Unigram", "vocab": vocab, "unk_id": unk_id, "byte_fallback": False}
    )
    scores = np.array([score for _, score in vocab], np.float64)
    # Of scores of 10 and more, unknown characters in a row could give a piece of the vocabulary.
    if unk_id is None or not np.isfinite(scores).all() or scores.min() >= 10:
        raise UnsupportedError("its model has no unknown token, or scores that no training gives")
    ids = {piece: id_ for id_, (piece, _) in enumerate(vocab)}  # of equal pieces, the last
    if max(len(piece.encode()) for piece in ids) > LONGEST_PIECE:
        raise UnsupportedError(f"its model has a piece of more than {LONGEST_PIECE} bytes")
    unk_score = ctypes.c_double(scores.min() - 10)  # 10 is the library's penalty
    new: int = library.unigram_new(
        *_pieces(ids), _at(scores), ctypes.c_int64(len(scores)), unk_id, unk_score
    )
    return new


def _wordpiece(library: ctypes.CDLL, model: Mapping[str, Any]) -> int:
    from tokenizers import pre_tokenizers

    vocab, unk_token = model["vocab"], model["unk_token"]
    prefix, max_chars = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
    known = {"type", "vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word"}
    _check_options({name: model[name] for name in set(model) - known}, {})
    if unk_token not in vocab:
        raise UnsupportedError("its model has no unknown token")
    alone = _where(pre_tokenizers.BertPreTokenizer(), times=2, found=lambda piece: len(piece) == 1)
    new: int = library.wordpiece_new(
        *_pieces(vocab),
        _at(alone),
        ctypes.c_int64(len(alone)),
        prefix.encode(),
        vocab[unk_token],
        ctypes.c_int64(max_chars),
    )
    return new


def _bpe(library: ctypes.CDLL, model: Mapping[str, Any], byte_level: Mapping[str, Any]) -> int:
    from tokenizers import Regex, pre_tokenizers

    vocab, merges = model["vocab"], model["merges"]
    given = {"type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback"}
    _check_options(
        {name: model[name] or None for name in set(model) - given},
        dict.fromkeys(
            ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        ),
    )
    given = {"trim_offsets", "add_prefix_space"}
    _check_options(
        {name: byte_level[name] for name in set(byte_level) - given},
        {"type": "ByteLevel", "use_regex": True},
    )
    chars = byte_chars()
    if any(char not in vocab for char in chars):
        raise UnsupportedError("its vocabulary lacks a byte")
    pairs = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], np.int32)
    columns = [np.ascontiguousarray(column) for column in pairs.reshape(-1, 3).T]
    byte_ids = np.array([vocab[char] for char in chars], np.int32)
    kinds = np.full(NUM_CODE_POINTS, OTHER, np.uint8)
    for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (WHITE, r"\s")):
        split = pre_tokenizers.Split(Regex(f"[^{pattern}]+"), "removed")
        kinds[_where(split, times=1, found=lambda piece: True).astype(bool)] = kind
    new: int = library.bpe_new(
        *(_at(column) for column in columns),
        ctypes.c_int64(len(merges)),
        _at(byte_ids),
        _at(kinds),
        ctypes.c_int64(len(kinds)),
    )
    return new


def _pieces(ids: Mapping[str, int]) -> tuple[Any, ...]:
    """A vocabulary in the order of its bytes: the bytes, where each piece ends, ids, how many."""
    pieces = sorted((piece.encode(), id_) for piece, id_ in ids.items() if piece)
    ends = np.cumsum([len(piece) for piece, _ in pieces], dtype=np.int64)
    of_pieces = np.array([id_ for _, id_ in pieces], np.int32)
    joined = b"".join(piece for piece, _ in pieces)
    return joined, _at(ends), _at(of_pieces), ctypes.c_int64(len(pieces))


def byte_chars() -> list[str]:
    """The character that byte-level vocabularies write each byte as: itself where it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _where(
    pre_tokenizer: Any, *, times: int, found: Callable[[str], bool]
) -> npt.NDArray[np.uint8]:
    """Of which code points a pre-tokenizer makes a piece that is looked for.

    Only the library knows its own tables of characters, whose version of Unicode is not Python's.

    Args:
        pre_tokenizer: of the library.
        times: how often each code point stands in the text that it splits.
        found: tells a piece.

    Returns:
        uint8 [code points], 1 for those.
    """
    chars = [chr(code) for code in range(PLANES_WITH_KINDS) if not 0xD800 <= code < 0xE000]
    flags = np.zeros(NUM_CODE_POINTS, np.uint8)
    for piece, _ in pre_tokenizer.pre_tokenize_str("".join(char * times for char in chars)):
        if found(piece):
            flags[np.frombuffer(piece.encode("utf-32-le"), np.uint32)] = 1
    return flags


def _at(array: npt.NDArray[Any]) -> Any:
    """Where an array lies, as C takes it; keeps it alive for the call."""
    return array.ctypes.data_as(ctypes.c_void_p)


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled code.

    Raises:
        UnsupportedError: it does not compile here.
    """
    try:
        library = compile_library(SOURCE, FLAGS)
    except UncompiledError as error:
        raise UnsupportedError(str(error)) from error
    for name in ("words_new", "unigram_new", "wordpiece_new", "bpe_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.words_put.restype = ctypes.POINTER(ctypes.c_uint32)
    return library
