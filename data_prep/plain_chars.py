"""Characters that normalising leaves as they are, whatever stands beside them.

Text of nothing else needs no normaliser. A character that is missing here costs time, no more.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_CODE_POINTS = 0x110000
SEPARATOR = "\u2ffb"  # between new words; as in native/text.h
# Letters and digits that normalising changes, if at all, whatever letter or digit stands beside
# them: no marks, no jamo, nothing that composes with what is before it.
ALONE = (
    "0-9A-Za-z\u0410-\u044f\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0904-\u0939\u0e01-\u0e30"
    "\u3041-\u3094\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
)
_LONGEST_CHAR = 4  # bytes


def plain_chars(parts: Sequence[Mapping[str, Any]], normalizer: Any) -> npt.NDArray[np.uint8]:
    """Which characters a normaliser leaves as they are, whatever stands beside them.

    For a map of a SentencePiece model that is read off the map. For what else there is, it is asked
    of the normaliser, and only of characters of which it is known that their neighbours do not
    matter. Runs of spaces may yet become one.

    Args:
        parts: of a tokenizer.json, what the normaliser does one after the other; each is one of
            `word_ids.NORMALIZERS`, or makes one space of several.
        normalizer: the same as the library has it, or None.

    Returns:
        uint8 [code points], 1 for those.
    """
    plain = np.ones(NUM_CODE_POINTS, np.uint8)
    for part in parts:
        if part["type"] == "Precompiled":
            plain[_mapped(base64.b64decode(part["precompiled_charsmap"]))] = 0
    if not {part["type"] for part in parts} <= {"Precompiled", "Replace"}:
        asked = np.zeros(NUM_CODE_POINTS, np.uint8)
        chars = [*map(chr, range(ord(" "), 0x7F)), *map(chr, _alone())]
        answers = normalizer.normalize_str(SEPARATOR.join(chars)).split(SEPARATOR)
        asked[[ord(a) for a, b in zip(chars, answers, strict=True) if a == b]] = 1
        plain &= asked
    return plain


def _alone() -> npt.NDArray[np.int64]:
    """The code points of ALONE."""
    edges = [ord(char) for char in ALONE if char != "-"]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    return np.concatenate([np.arange(first, last + 1) for first, last in ranges])


def _mapped(charsmap: bytes) -> npt.NDArray[np.int64]:
    """The code points that have to do with a key of a map: one alone, or of a longer one behind.

    The library looks up whole graphemes and single characters; the shortest key that one begins
    with takes its place. So where no character is a key, and none stands in a key behind its first,
    nothing is found, wherever graphemes end.

    Args:
        charsmap: of a SentencePiece model: the size of a trie in bytes, the trie as an array of
            32-bit units (darts-clone's; keys in UTF-8), and the replacements.
    """
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    # Where the children of a unit are: at this, xor their bytes.
    base = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    found: list[npt.NDArray[np.int64]] = []
    seen = np.zeros(len(units), bool)  # ends of characters: keys share what they end with
    at, is_first = base[:1], True
    while len(at):
        codes, ends = _chars(units, base, at)
        is_key = (units[ends] & 0x100) != 0
        found.append(codes[is_key] if is_first else codes)
        ends = np.unique(ends)
        ends = ends[~seen[ends]]
        seen[ends] = True
        at, is_first = base[ends], False
    return np.unique(np.concatenate(found))


def _chars(
    units: npt.NDArray[np.int64], base: npt.NDArray[np.int64], at: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The characters that go on from places in a trie, and the units that they lead to."""
    labels = np.arange(1, 256)
    codes, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    code, left = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
    for depth in range(_LONGEST_CHAR):
        children = at[:, None] ^ labels
        there = children < len(units)
        # a unit that is a value has its highest bit set, so that it is nobody's child
        there &= (units[np.where(there, children, 0)] & 0x800000FF) == labels
        parent, label = np.nonzero(there)
        byte, unit = labels[label], children[parent, label]
        if depth:
            code, left = code[parent] << 6 | (byte & 0x3F), left[parent] - 1
        else:  # how many bytes follow, and which of this one's bits count
            left = (byte >= 0xC0).astype(np.int64) + (byte >= 0xE0) + (byte >= 0xF0)
            code = byte & np.array([0x7F, 0x1F, 0x0F, 0x07])[left]
        is_whole = left == 0
        codes.append(code[is_whole])
        ends.append(unit[is_whole])
        at, code, left = base[unit[~is_whole]], code[~is_whole], left[~is_whole]
    return np.concatenate(codes), np.concatenate(ends)
