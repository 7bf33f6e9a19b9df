from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.clean import (
    JUDGED_CHARS,
    REPEATED_CHARS,
    Cleaner,
    LanguageCheck,
    normalise,
    repetition,
)
from data_prep.command import ConfigError
from data_prep.config import Prep

# Few characters, so that they meet: marks that compose or not, every kind of white space, controls.
AWKWARD = st.text(
    st.sampled_from(
        "a e\u0301\u0327\u0915\u093c\u0958\u1100\u1161\u11a8\uac00\u212b\u0344\u00e9\U0001d15e"
        " \t\n\r\x0b\x0c\x1c\x1f\x00\x7f\x85\x9f\xa0\u1680\u200b\u200c\u200d\u2028\u2029\u3000"
        "\ufeff\U0001f600\U0010ffff"
    )
)
ANY_TEXT = st.text() | AWKWARD


def by_regular_expressions(text: str) -> str:
    """The definition, as it was before it was made fast."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]", " ", text)
    return re.sub(r"\s+", " ", text).strip()


@given(ANY_TEXT)
def test_normalise_is_its_definition(text: str) -> None:
    assert normalise(text) == by_regular_expressions(text)


def test_normalise_is_its_definition_for_every_character() -> None:
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code <= 0xDFFF:
            text = f"{chr(code)}a {chr(code)} b{chr(code)}{chr(code)}c{chr(code)}"
            assert normalise(text) == by_regular_expressions(text), hex(code)


@given(ANY_TEXT)
@example("e\n\u0301")  # nothing composes across a line's end
def test_lines_are_those_of_the_folded_text(text: str) -> None:
    kept = normalise(text, keep_lines=True)
    assert kept.replace("\n", " ") == normalise(text)
    lines = [by_regular_expressions(line) for line in re.split("\r\n|\r|\n", text)]
    assert kept == "\n".join(line for line in lines if line)


def test_real_text_is_normalised_by_the_definition(corpus: Path) -> None:
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path) as lines:
            for line, _ in zip(lines, range(40), strict=False):
                text = json.loads(line)["text"]
                clean = by_regular_expressions(text)
                assert normalise(text) == clean
                assert normalise(text, keep_lines=True).replace("\n", " ") == clean


def repeated_share(text: str) -> float:
    runs = [text[i : i + REPEATED_CHARS] for i in range(len(text) - REPEATED_CHARS + 1)]
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


@given(st.lists(st.text("ab\u3042\U0001f600 ", min_size=5, max_size=50), max_size=3), st.data())
def test_repetition_is_the_share_of_runs_seen_before(pieces: list[str], data: st.DataObject):
    text = "".join(data.draw(st.lists(st.sampled_from([*pieces, "x"]), max_size=20)))
    assert repetition(text) == pytest.approx(repeated_share(text), abs=1e-12)


def test_repetition_spans_0_to_1() -> None:
    numbers = " ".join(map(str, range(2000)))
    assert repetition("") == repetition("a" * 32) == 0
    assert repetition(numbers) == repeated_share(numbers) < 0.01
    assert repetition(numbers + "\n" + numbers) == repetition(numbers + " " + numbers)
    assert 0.49 < repetition(numbers + " " + numbers) < 0.51
    assert repetition("漢" * 10_000) > 0.999
    assert repetition("buy now! " * 1000) > 0.99


def test_real_text_repeats_little_in_any_language(corpus: Path) -> None:
    for path in sorted(corpus.glob("*.jsonl.gz")):
        texts = sample(path, 100)
        assert sum(repetition(text) > 0.3 for text in texts) <= 1, path


def sample(path: Path, count: int) -> list[str]:
    """`count` of a file's documents, evenly spread, clean."""
    with gzip.open(path) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [normalise(text) for text in texts[:: max(1, len(texts) // count)]]


@pytest.mark.parametrize(
    ("prep", "text", "outcome"),
    [
        (Prep(), " a\n b ", ("a b", None)),
        (Prep(dedup_lines=True), " a\n\n b ", ("a\nb", None)),
        (Prep(), " \x00\n", (None, "empty")),
        (Prep(min_chars=3), " ab ", (None, "short")),
        (Prep(min_chars=3), " a b ", ("a b", None)),
        (Prep(min_chars=3), " ", (None, "empty")),
        (Prep(max_repetition=0.9), "a" * 1000, (None, "repetitive")),
        (Prep(max_repetition=0.9, min_chars=2000), "a" * 1000, (None, "short")),
        (Prep(), "a" * 1000, ("a" * 1000, None)),
    ],
)
def test_the_first_rule_that_applies_has_the_document(prep: Prep, text: str, outcome) -> None:
    assert Cleaner(prep)("en", text) == outcome


def test_repetition_at_the_limit_stays() -> None:
    text = "a" * 100
    limit = repetition(text)
    assert Cleaner(Prep(max_repetition=limit))("en", text)[1] is None
    assert Cleaner(Prep(max_repetition=limit - 1e-9))("en", text)[1] == "repetitive"


def test_excluded_documents_are_counted_by_file(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(13))
    (tmp_path / "a.txt").write_text(words)
    cleaner = Cleaner(Prep(exclude=[f"{tmp_path}/*.txt"]))
    assert cleaner("en", f"so it says: {words}!") == (None, "excluded")
    assert cleaner("en", "so it says")[1] is None
    assert cleaner.excluded_by == {str(tmp_path / "a.txt"): 1}


# -- language ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check() -> LanguageCheck:
    return LanguageCheck()


@pytest.fixture(scope="module")
def corpus_texts(corpus: Path) -> dict[str, list[str]]:
    return {path.name.split(".")[0]: sample(path, 60) for path in sorted(corpus.glob("*.jsonl.gz"))}


@pytest.mark.parametrize(
    "label",
    ["zh", "zh-Hans", "zh_TW", "zho", "cmn_Hani", "cmn-Hans", "ZH"],
)
def test_spellings_of_a_label_are_one_language(check, corpus_texts, label: str) -> None:
    assert not any(check.is_other(label, text) for text in corpus_texts["zh"])
    long = [text for text in corpus_texts["el"] if len(text) >= JUDGED_CHARS]
    assert sum(check.is_other(label, text) for text in long) > 0.95 * len(long)


@pytest.mark.parametrize(
    ("label", "language"),
    [
        ("pt_BR", "pt"),
        ("por_Latn", "pt"),
        ("arb_Arab", "ar"),
        ("swh_Latn", "sw"),
        ("pes_Arab", "fa"),
        ("ind_Latn", "id"),
        ("ms", "id"),
        ("zsm_Latn", "id"),
        ("eng_Latn", "en"),
        ("rus-Cyrl", "ru"),
    ],
)
def test_other_spellings(check, corpus_texts, label: str, language: str) -> None:
    assert sum(check.is_other(label, text) for text in corpus_texts[language]) <= 1


@pytest.mark.parametrize("label", ["iw", "he", "heb_Hebr"])
def test_renamed_codes(check, corpus_texts, label: str) -> None:
    hebrew = "בראשית ברא אלהים את השמים ואת הארץ והארץ היתה תהו ובהו וחשך על פני תהום " * 4
    assert not check.is_other(label, hebrew)
    assert check.is_other(label, next(text for text in corpus_texts["el"] if len(text) > 500))


@pytest.mark.parametrize("label", ["und", "x123", "german", "xx", "tlh-", "qqq", "yue", "-", "0"])
def test_labels_that_the_detector_does_not_know_are_never_dropped(check, corpus_texts, label: str):
    assert not any(check.is_other(label, texts[0]) for texts in corpus_texts.values())


def test_languages_that_are_not_told_apart(check, corpus_texts) -> None:
    assert not any(check.is_other("ms", text) for text in corpus_texts["id"][:5])
    assert any(check.is_other("vi", text) for text in corpus_texts["id"][:5])


def test_short_texts_are_not_judged(check, corpus_texts) -> None:
    text = next(text for text in corpus_texts["ru"] if len(text) > 500)
    assert check.is_other("en", text[:JUDGED_CHARS])
    assert not check.is_other("en", text[: JUDGED_CHARS - 1])


@given(text=ANY_TEXT)
def test_no_text_is_beyond_the_detector(check, text: str) -> None:
    check.is_other("en", normalise(text * 20))


def test_rightly_labelled_documents_stay(check, corpus: Path) -> None:
    """All of the languages that the corpus labels without a fault.

    The others hold untranslated English pages, of which the check rightly finds many.
    """
    languages = ["ar", "bg", "el", "en", "es", "fa", "hi", "ja", "ko", "pt", "ru", "th", "uk", "zh"]
    kept = dropped = 0
    for language in languages:
        for text in sample(corpus / f"{language}.jsonl.gz", 10**9):
            is_other = check.is_other(language, text)
            dropped, kept = dropped + is_other, kept + (not is_other)
    assert kept > 9000
    assert dropped < 0.001 * (kept + dropped)


def test_wrongly_labelled_documents_are_found(check, corpus_texts) -> None:
    rng = random.Random(1)
    found = wrong = 0
    for language, texts in corpus_texts.items():
        others = [other for other in corpus_texts if other != language]
        for text in texts:
            if len(text) >= JUDGED_CHARS:
                found += check.is_other(rng.choice(others), text)
                wrong += 1
    assert wrong > 1200
    assert found > 0.95 * wrong
    english = [text for text in corpus_texts["en"] if len(text) >= JUDGED_CHARS]
    assert sum(check.is_other("sw", text) for text in english) > 0.95 * len(english)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycld2", None)
    with pytest.raises(ConfigError, match=r"pycld2.* pip install pycld2==0\.42"):
        Cleaner(dataclasses.replace(Prep(), check_language=True))
