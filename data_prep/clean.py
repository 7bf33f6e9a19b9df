"""One document at a time: its clean text, or the rule by which it is dropped."""

from __future__ import annotations

import collections
import functools
import re
import unicodedata
from typing import Any

import numpy as np

from data_prep.command import ConfigError
from data_prep.config import Prep
from data_prep.overlap import Overlap

REPEATED_CHARS = 32
"""Characters in the runs that `repetition` compares."""
DETECTED_CHARS = 1000
"""Characters, from a document's middle, that its language is detected from."""
JUDGED_CHARS = 200
"""Fewer tell too little: one in twenty pieces of 30 characters would be taken for another."""
DETECTED_PERCENT = 70
"""Least share of these that must be in another language for a document to be dropped."""

# All white space but the space itself, and the control characters: Python's \s lacks some.
_TO_SPACE = re.compile(
    "[\x00-\x1f\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"
)
_DOUBLING_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, otherwise arbitrary
_NO_LANGUAGES = {"xx", "zzp", "tlh"}  # the detector's codes for lone scripts, Pig Latin, Klingon
# Standards of one language or nearly so: the detector does not tell them apart reliably.
_NOT_TOLD_APART = ({"id", "ms"}, {"no", "nb", "nn", "da"}, {"bs", "hr", "sr"})


class Cleaner:
    """Cleans documents by the settings of `prep`.

    The rules are tried in this order and the first that applies has the document: `empty` (nothing
    is left), `short` (fewer than prep.min_chars characters are left), `repetitive` (`repetition`
    is above prep.max_repetition), `language` (prep.check_language, `LanguageCheck`), `excluded`
    (overlaps with a file of prep.exclude, `Overlap`).
    """

    def __init__(self, prep: Prep) -> None:
        """Load what the settings need.

        Raises:
            ConfigError: a setting cannot be followed: a package is missing, or an evaluation file
                is not as it should be.
            RunError: an evaluation file cannot be read to its end.
        """
        self._prep = prep
        self._check = LanguageCheck() if prep.check_language else None
        self._overlap = Overlap(prep.exclude, prep.exclude_ngram) if prep.exclude else None
        self.excluded_by: collections.Counter[str] = collections.Counter()
        """Evaluation file -> documents that were dropped for it."""

    def __call__(self, language: str, text: str) -> tuple[str | None, str | None]:
        """Clean a document.

        Args:
            language: the document's label.
            text: the document, without lone surrogates.

        Returns:
            (clean text, None), where lines are kept if prep.dedup_lines is set; or (None, rule).
        """
        clean = normalise(text, keep_lines=self._prep.dedup_lines)
        rule = self._broken_rule(language, clean)
        return (clean, None) if rule is None else (None, rule)

    def _broken_rule(self, language: str, clean: str) -> str | None:
        if not clean:
            return "empty"
        if len(clean) < self._prep.min_chars:
            return "short"
        if self._prep.max_repetition < 1 and repetition(clean) > self._prep.max_repetition:
            return "repetitive"
        if self._check is not None and self._check.is_other(language, clean):
            return "language"
        if self._overlap is not None and (file := self._overlap.matches(clean)) is not None:
            self.excluded_by[file] += 1
            return "excluded"
        return None


def normalise(text: str, keep_lines: bool = False) -> str:
    r"""NFC, no control characters, white space runs folded to one space, none at the ends.

    Args:
        text: any.
        keep_lines: do so for each line, ended by \n, \r or both, and drop those that are empty.

    Returns:
        The clean text; with keep_lines, lines between single \n. That text with spaces in their
        place is the same as without keep_lines.
    """
    if keep_lines:
        lines = map(normalise, text.replace("\r", "\n").split("\n"))
        return "\n".join(filter(None, lines))
    # Scans for a substring cost a tenth of a regular expression that stops at every space.
    text = unicodedata.normalize("NFC", text).replace("\n", " ")
    if not text.isprintable():  # no character that is printable is to become a space
        text = _TO_SPACE.sub(" ", text)
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


def repetition(text: str) -> float:
    """The share of a text's runs of 32 characters that stand in it before.

    Of all runs (one begins at each character but the last 31) this is 1 - distinct / all. It does
    not depend on the script, and hardly on the length: prose repeats few runs as long as these.

    Args:
        text: without lone surrogates; newlines count as spaces.

    Returns:
        0 (none; also a text of up to 32 characters) to nearly 1 (one character or phrase only).
    """
    runs = np.frombuffer(text.replace("\n", " ").encode("utf-32-le"), "<u4").astype(np.uint64)
    if len(runs) <= REPEATED_CHARS:
        return 0.0
    width = 1
    while width < REPEATED_CHARS:  # hashes of runs of 1, 2, 4, … characters
        runs = runs[:-width] * _DOUBLING_BASE ** np.uint64(width) + runs[width:]
        width *= 2
    runs.sort()
    repeated = np.count_nonzero(runs[1:] == runs[:-1])
    return float(repeated / len(runs))


class LanguageCheck:
    """Whether a document is surely in another language than its label says, by CLD2."""

    def __init__(self) -> None:
        """Load the detector.

        Raises:
            ConfigError: the packages are not installed.
        """
        try:
            import langcodes
            import pycld2
        except ImportError as error:
            raise ConfigError(
                f"prep.check_language=true needs the package {error.name}, which is not installed "
                "here; pip install pycld2==0.42 langcodes==3.5.1, or set it to false"
            ) from error
        self._langcodes: Any = langcodes
        self._cld2: Any = pycld2
        self._code = functools.cache(self._primary_code)
        names = dict(pycld2.LANGUAGES)
        detected = {self._code(names[n]) for n in pycld2.DETECTED_LANGUAGES if n in names}
        self._known = frozenset(code for code in detected if code is not None) - _NO_LANGUAGES

    def is_other(self, language: str, text: str) -> bool:
        """Whether the text is to be dropped.

        Args:
            language: its label: an ISO 639 code, with or without script or region, in whatever
                usual spelling (zh-Hans, pt_BR, iw, eng_Latn).
            text: a cleaned document.

        Returns:
            True only if the detector is sure of another language for most of the text. Never for a
            label that the detector does not know, such as und, nor for a text of fewer than
            JUDGED_CHARS characters.
        """
        label = self._code(language)
        if label not in self._known or len(text) < JUDGED_CHARS:
            return False
        begin = max(0, len(text) - DETECTED_CHARS) // 2
        try:
            is_sure, _, found = self._cld2.detect(text[begin : begin + DETECTED_CHARS])
        except self._cld2.error:  # its way of saying that it does not know a character
            return False
        _, name, percent, _ = found[0]
        detected = self._code(name)
        return (
            is_sure
            and percent >= DETECTED_PERCENT
            and detected in self._known
            and detected != label
            and not any({label, detected} <= group for group in _NOT_TOLD_APART)
        )

    def _primary_code(self, tag: str) -> str | None:
        """The language of a tag as one code for each: iw is he, cmn_Hans is zh."""
        try:
            standard = self._langcodes.standardize_tag(tag, macro=True)
        except self._langcodes.LanguageTagError:
            return None
        language: str | None = self._langcodes.Language.get(standard).language
        return language
