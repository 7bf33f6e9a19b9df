"""The tokenizer seam: the teacher's own fast tokenizer, and batches of text to ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError, one_line, skip_unreachable_hub
from data_prep.shards import id_dtype, tokenizer_fingerprint
from data_prep.word_ids import SPACE, UnsupportedError, WordIds, byte_chars, parts

CHECKED_CHARS = 100_000  # of the first texts
CHECKED_CHARS_OF_TEXT = 10_000

CLOSERS = "\"'’”»›)]}）］」』】》〉"  # may stand behind the end of a sentence

# What tokenizers treat in ways of their own: joined with the words around it, split, or replaced.
PROBE = (
    "",
    " ",
    "\n",
    "It's we'll I'D ''s 's' they''re 'tis a'b' '",
    "  two  spaces, \t tabs\tand \r\n lines\n\n \n end \n",
    "\u00a0no\u00a0break\u2003em\u3000wide\u1680ogham\u2028line\u2029end\u0085next\u202f\u205f.",
    "\u200bzero\u200bwidth\u200b \u200d \ufeff \u2060 soft\u00adhyphen \ufeff",
    "ﬁ ﬃ ﷺ ½ ² ① ㈱ ㎏ Ⅷ ẛ̣ Å Å é e\u0301 a\u0301\u0323\u0302 q\u0307\u0323",
    "\u0301 \u0301a a \u0301\u0301 \u05bf \u0e33 \u0eb3 \u1160 \u11a8 \uff9e",
    "\u1112\u1161\u11ab 한국어 \u3131\u314f \u1100\u1160 ｶﾞ ﾊﾟ か\u3099 が ｱｲｳ ＡＢＣ ａｂｃ １２",
    "👩\u200d👩\u200d👧 👍🏽 🇩🇪🇫 ❤\ufe0f 1\ufe0f\u20e3 🏴\U000e0067\U000e0062\U000e007f",
    "".join(
        f"a{char} {char}b {char}\n" for char in "\u0600\u0605\u06dd\u070f\u08e2\u0d4e\U000110bd"
    ),
    "▁ ▁▁ a▁b ▁a▁ ▁\u0301 a ▁",
    "\0 a\0b \x01\x02 \x1b[0m \x7f \x85 \ue000 \uf8ff \U000f0000 \uffff \u0378 \U0003fffd",
    "＜ｓ＞ ＜/s＞ ＜ｍａｓｋ＞ ［ＳＥＰ］ < s > [ SEP ] <S> [mask]",
    "\u2ffb \u2ffb\n\u2ffb\n a\u2ffbb",
    "İstanbul ıI ß ẞ Σας ΌΣΟΣ ǅ ŉ ΐ naïve Ñandú Ł ø",
    "中文和English混合，。「日本語」ﾃｽﾄ 𠀀𪛖𰀀 ไทยภาษา हिन्दी क़ क्\u200dष العَرَبِيَّة لا",
    "$100.00 3,14 1st a_b C++ #x @y ~ `` ^^ == <> … — – ‘’ “” «» · ।",
    "a" * 300 + " " + "ab" * 200 + " " + "." * 99 + " " + "漢" * 150 + " " + "xyzzy" * 20,
    "##a ## a##b Ġa Ċ <0x0A> <unk>",
)


class Tokenizer:
    """The teacher's fast tokenizer, without truncation, padding or special tokens.

    Attributes:
        cls_id: stands before a text.
        sep_id: stands behind a text.
        pad_id: fills rows.
        vocab_size: one more than the largest id.
        dtype: of ids, uint16 or uint32.
        fingerprint: equal for copies of a tokenizer.
        starts_word: bool [vocab_size], whether a word begins with this id, so that a text may be
            cut before it. Ids without a piece do not; where pieces bear no mark, all do.
        ends_sentence: bool [vocab_size], whether this id's text ends as sentences do, quotation
            marks and brackets behind that apart.

    Args:
        source: hub id or folder.
        warn: is told in a sentence that encoding is slow, and why; None prints it on stderr.

    Raises:
        ConfigError: nothing loads from there, it is not a fast tokenizer, or it does not frame a
            text as one token, text, one token, or has no padding token of its own.
    """

    def __init__(self, source: str, *, warn: Callable[[str], object] | None = None) -> None:
        skip_unreachable_hub(source)
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # "sequence longer than the maximum" is what we cut ourselves
        try:
            loaded: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            raise ConfigError(
                f"the tokenizer {source!r} does not load ({one_line(error)}); name a hub id or a "
                "folder with tokenizer.json in prep.tokenizer or teacher.model"
            ) from error
        if not getattr(loaded, "is_fast", False):
            raise ConfigError(
                f"the tokenizer {source!r} has no fast (tokenizer.json) form, which batches need; "
                "convert it with transformers first"
            )
        if not loaded.get_vocab().keys() - set(loaded.all_special_tokens):
            raise ConfigError(  # transformers makes an empty one of a folder without it
                f"the tokenizer {source!r} knows special tokens only, so all text would be "
                "unknown; name a folder with tokenizer.json in prep.tokenizer or teacher.model"
            )
        framed: list[int] = loaded("")["input_ids"]
        pad_id: int | None = loaded.pad_token_id
        if len(framed) != 2 or pad_id is None or pad_id in framed:
            raise ConfigError(
                f"the tokenizer {source!r} frames an empty text as {framed} with padding {pad_id}; "
                "rows need one token before, one after, and a padding token that is neither"
            )
        self.cls_id, self.sep_id = framed
        self.pad_id = pad_id
        ids: dict[str, int] = loaded.get_vocab()
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps
        self.dtype = id_dtype(self.vocab_size)
        self.fingerprint = tokenizer_fingerprint(loaded)
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        content = json.loads(self._backend.to_str())
        self.starts_word = _starts_word(ids, content, self.vocab_size)
        self.ends_sentence = _ends_sentence(ids, content, self.vocab_size)
        self._source, self._warn = source, warn or print_warning
        self._texts, self._unchecked = 0, CHECKED_CHARS
        self._fast: WordIds | None = None
        try:
            self._fast = WordIds(self._backend, content)
        except UnsupportedError as error:
            self._warn(
                f"the tokenizer {source!r} encodes several times slower than it might: {error}"
            )
        else:
            self._compare(PROBE, "the probe's text")

    def encode(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of texts, without special tokens around them: those that `tokenizers` gives.

        Args:
            texts: of any length, without lone surrogates.

        Returns:
            `dtype` [total], the ids of all texts end to end, and int64 [texts], how many each has.
        """
        if self._fast is not None and self._unchecked > 0:
            self._check_first(texts)
        self._texts += len(texts)
        encode = self._encode_slowly if self._fast is None else self._fast.encode
        ids, lengths = encode(texts)
        return ids.astype(self.dtype, copy=False), lengths

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """The text of ids [length], without the frame and other special tokens."""
        text: str = self._backend.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def _encode_slowly(
        self, texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """By `tokenizers` itself, which decides what is right."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        lengths = np.array([len(of_text) for of_text in ids], np.int64)
        return np.concatenate([np.empty(0, np.uint32), *ids]), lengths

    def _check_first(self, texts: Sequence[str]) -> None:
        """Compare on the first of the very texts that are to be encoded."""
        sample: list[str] = []
        for text in texts:
            if self._unchecked <= 0:
                break
            sample.append(text[:CHECKED_CHARS_OF_TEXT])
            self._unchecked -= 1 + len(sample[-1])
        self._compare(sample, f"this process's texts, counted from {self._texts + 1}")

    def _compare(self, texts: Sequence[str], where: str) -> None:
        """Encode by `tokenizers` from now on if the fast ids of any of these texts are others."""
        assert self._fast is not None
        fast, slow = self._fast.encode(texts), self._encode_slowly(texts)
        if np.array_equal(fast[0], slow[0]) and np.array_equal(fast[1], slow[1]):
            return
        self._fast = None
        place = _first_difference(fast, slow)
        self._warn(
            f"the fast ids of {self._source!r} differ from those of tokenizers in text {place} of "
            f"{where}, so all is encoded by tokenizers, several times slower; please report it"
        )


def print_warning(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def _first_difference(
    one: tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]],
    other: tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]],
) -> int:
    """The number of the first text, from 1, whose ids differ between two encodings."""
    starts = [np.cumsum(lengths) - lengths for _, lengths in (one, other)]
    for text, (a, b) in enumerate(zip(*starts, strict=True)):
        first, second = one[0][a : a + one[1][text]], other[0][b : b + other[1][text]]
        if not np.array_equal(first, second):
            return text + 1
    raise AssertionError("the encodings are equal")


def _starts_word(
    ids: Mapping[str, int], content: Mapping[str, Any], vocab_size: int
) -> npt.NDArray[np.bool_]:
    """Which ids begin a word, by the mark that pieces of the vocabulary bear."""
    inner = content["model"].get("continuing_subword_prefix")
    marks: tuple[str, ...] = ("",)  # nothing is marked: every piece is a word
    if _is_byte_level(content):
        marks = tuple(byte_chars()[ord(space)] for space in " \t\n\v\f\r")
    elif any(piece.startswith(SPACE) for piece in ids):
        marks = (SPACE,)
    flags = np.zeros(vocab_size, np.bool_)
    for piece, id_ in ids.items():
        flags[id_] = not piece.startswith(inner) if inner else piece.startswith(marks)
    return flags


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether the vocabulary spells bytes, each as a character."""
    before = [*parts(content["normalizer"]), *parts(content["pre_tokenizer"])]
    return any(part["type"] == "ByteLevel" for part in before)


def _ends_sentence(
    ids: Mapping[str, int], content: Mapping[str, Any], vocab_size: int
) -> npt.NDArray[np.bool_]:
    """Which ids' text ends as sentences do, in any script."""
    from tokenizers import Regex, pre_tokenizers

    byte_of = {char: byte for byte, char in enumerate(byte_chars())}
    is_byte_level = _is_byte_level(content)
    last = {}
    for piece, id_ in ids.items():
        if is_byte_level:
            piece = bytes(byte_of.get(char, 0) for char in piece).decode(errors="replace")
        last[id_] = piece.rstrip(CLOSERS)[-1:]
    # The library's regular expressions know what Python's do not: which characters end sentences.
    split = pre_tokenizers.Split(Regex(r"[^\p{Sentence_Terminal}…]+"), "removed")
    found = split.pre_tokenize_str("".join(set(last.values())))
    terminals = {char for chars, _ in found for char in chars}
    flags = np.zeros(vocab_size, np.bool_)
    flags[[id_ for id_, char in last.items() if char in terminals]] = True
    return flags
