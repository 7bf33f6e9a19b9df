"""Hashes of runs of words: what evaluation texts and near duplicates are recognised by."""

from __future__ import annotations

import functools
import sys
import unicodedata

import numpy as np
from numpy.typing import NDArray

# Scripts that put no spaces between words: here every character is a unit of its own, which counts
# as a half (1) or a quarter (2 halvings) of a word, about what their words are long.
_UNSPACED = (
    (0x3005, 0x3007, 1),  # ideographic iteration mark, closing mark, zero
    (0x3040, 0x30FF, 1),  # Hiragana, Katakana
    (0x31F0, 0x31FF, 1),  # Katakana phonetic extensions
    (0x3400, 0x4DBF, 1),  # Han
    (0x4E00, 0x9FFF, 1),  # Han
    (0xF900, 0xFAFF, 1),  # Han, compatibility
    (0xFF66, 0xFF9F, 1),  # Katakana, halfwidth
    (0x20000, 0x3FFFF, 1),  # Han, supplementary planes
    (0x0E00, 0x0EFF, 2),  # Thai, Lao
    (0x1000, 0x109F, 2),  # Myanmar
    (0x1780, 0x17FF, 2),  # Khmer
)
_HALVINGS = np.uint64(3)  # the bits of a letter's hash that say how often
# Odd, so that they have an inverse modulo 2**64; otherwise arbitrary.
_CHARACTER_BASE = 0x9E3779B97F4A7C15
_UNIT_BASE = 0xD6E8FEB86659FD93
_FIRST = 1 << 16  # powers that are kept: most documents need no more


def shingles(text: str, words: int) -> NDArray[np.uint64]:
    """A hash of every run of `words` words, in order; equal runs hash equally in any text.

    A word is a run of letters, marks and digits, compared in lower case; whatever else stands
    between words is ignored. In scripts without spaces a character counts as half a word (Han,
    Kana) or a quarter (Thai, Lao, Burmese, Khmer).

    Args:
        text: without lone surrogates.
        words: in a run, at least 1.

    Returns:
        [runs] hashes, the same on every machine whose Python knows the same Unicode version;
        empty where the text has fewer words.
    """
    units, quarters = _units(text)
    ends = np.cumsum(quarters)
    begins = ends - quarters
    # A run begins with any unit and ends with the unit that makes it long enough.
    runs = int(np.searchsorted(begins, quarters.sum() - 4 * words, side="right"))
    unit_at = np.repeat(np.arange(len(units)), quarters)
    stops = unit_at[begins[:runs] + 4 * words - 1] + 1
    sums = np.concatenate([np.zeros(1, np.uint64), _sums(units)])
    return mix((sums[stops] - sums[:runs]) * _powers(_inverse(_UNIT_BASE), runs))


def whole(text: str) -> NDArray[np.uint64]:
    """[1] the hash of all words of the text; [0] where it has no word."""
    units, _ = _units(text)
    return mix(_sums(units)[-1:])


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: one to one, and each bit of a value moves all bits of its mix.

    Args:
        values: of any shape.

    Returns:
        Of the same shape.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _units(text: str) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """[units] hashes of words and lone characters, and as how many quarter words each counts."""
    letters = _letters().take(np.frombuffer(text.encode("utf-32-le"), "<u4"))
    is_letter = letters != 0
    halvings = letters & _HALVINGS
    is_alone = halvings != 0
    goes_on = is_letter[1:] & is_letter[:-1] & ~(is_alone[1:] | is_alone[:-1])
    is_start = is_letter.copy()
    is_start[1:] &= ~goes_on
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    # What is no letter is 0 and adds nothing, so a word may be summed up to the next one.
    sums = np.add.reduceat(letters * _powers(_CHARACTER_BASE, len(letters)), starts)
    units = mix(sums * _powers(_inverse(_CHARACTER_BASE), len(letters))[starts])
    return units, 4 >> halvings[starts].astype(np.int64)


@functools.cache
def _letters() -> NDArray[np.uint64]:
    """Of each code point: 0 if it belongs to no word, else a hash with its _HALVINGS."""
    lower = np.zeros(sys.maxunicode + 1, np.uint64)
    for code in range(len(lower)):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            lower[code] = ord(character.lower()[0])
    letters = mix(lower) & ~_HALVINGS
    for first, last, halvings in _UNSPACED:
        letters[first : last + 1] |= np.uint64(halvings)
    return np.where(lower == 0, np.uint64(0), letters)


def _sums(units: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Running sums of units[i] * base**i, modulo 2**64."""
    return np.cumsum(units * _powers(_UNIT_BASE, len(units)), dtype=np.uint64)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base**0 … base**(count - 1), modulo 2**64; not to be written into."""
    return (_first_powers(base) if count <= _FIRST else _all_powers(base, count))[:count]


@functools.cache
def _first_powers(base: int) -> NDArray[np.uint64]:
    return _all_powers(base, _FIRST)


def _all_powers(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


@functools.cache
def _inverse(base: int) -> int:
    return pow(base, -1, 1 << 64)
