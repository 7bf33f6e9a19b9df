from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import spill as spill_module
from data_prep import tokens as tokens_module
from data_prep.config import Prep
from data_prep.container import write_container
from data_prep.exchange import KEY, partition_of, write_run
from data_prep.spill import Counts, Spills, key_of
from data_prep.tokens import DRAWS, LINE, Removals, TokenFiles, framed, tokenise, tokens_path

PREP = Prep(seq_len=16)
NOTHING_KNOWN = Removals(np.zeros(0, KEY))
Units = Sequence[Sequence[tuple[str, str]]]


@dataclasses.dataclass
class Job:
    """Units spilled into a folder, and what became of them."""

    spills: Spills
    work: Path
    tokenizer: Any
    of: int = 4

    def tokenise(self, removals: Removals = NOTHING_KNOWN) -> TokenFiles:
        paths = [tokens_path(self.work, partition) for partition in range(self.of)]
        for partition, path in enumerate(paths):
            tokenise(self.spills, partition, path, PREP, self.tokenizer, removals)
        return TokenFiles(paths, self.spills.languages)

    def documents(self, files: TokenFiles) -> list[tuple[str, str, np.void]]:
        """Language, text as its ids say, and record of every document."""
        found = []
        for partition in range(len(files)):
            ids = files.tokens(partition)
            for record in files.documents(partition):
                start = int(record["offset"])
                text = self.tokenizer.decode(ids[start : start + int(record["tokens"])])
                found.append((files.languages[record["language"]], text, record))
        return found

    def texts(self, files: TokenFiles) -> list[tuple[str, str]]:
        return sorted((language, text) for language, text, _ in self.documents(files))


@pytest.fixture(scope="session")
def job(
    spill_units: Callable[..., Spills], letters: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Job]:
    def make(units: Units, **options: Any) -> Job:
        work = tmp_path_factory.mktemp("work")
        return Job(spill_units(work, units, **options), work, letters)

    return make


def verdicts(path: Path, records: Sequence[tuple[Any, ...]], dtype: Any) -> list[Path]:
    table = np.array(records, dtype=dtype)
    with write_container(path) as writer:
        write_run(writer, table, partition_of(table["hi"], 4), 4)
    return [path]


def assert_all_is_counted(made: Job, files: TokenFiles) -> None:
    """What came in is what went away, by rule, and what stayed; by language."""
    counts = made.spills.counts + files.counts()
    for _, _, record in made.documents(files):
        language = files.languages[record["language"]]
        counts[language, "chars_stay"] += int(record["chars"])
        counts[language, "documents_stay"] += 1
    for what in ("chars", "documents"):
        for language in made.spills.languages:
            others = sum(
                number
                for (name, rule), number in counts.items()
                if name == language and rule.startswith(f"{what}_") and not rule.endswith("_in")
            )
            assert others == counts[language, f"{what}_in"]


few_texts = st.lists(
    st.lists(st.tuples(st.sampled_from(["b", "c", "a"]), st.sampled_from("uvwxyz~")), max_size=9),
    max_size=4,
)


@settings(max_examples=25)
@given(few_texts)
def test_each_text_stays_once_under_the_alphabetically_first_language(
    job: Callable[..., Job], units: list[list[tuple[str, str]]]
) -> None:
    made = job(units)
    files = made.tokenise()
    first: dict[str, str] = {}
    for unit in units:
        for language, text in unit:
            first[text] = min(language, first.get(text, language))
    silent = first.pop("~", None)
    assert made.texts(files) == sorted((language, text) for text, language in first.items())
    counts = files.counts()
    assert sum(counts[name, "documents_no_tokens"] for name in "abc") == (silent is not None)
    again = collections.Counter(language for unit in units for language, _ in unit)
    again -= collections.Counter(first.values()) + collections.Counter([silent] if silent else [])
    for name in "abc":
        assert counts[name, "documents_duplicate"] == counts[name, "chars_duplicate"] == again[name]
    assert_all_is_counted(made, files)


def test_digests_that_are_half_equal_are_of_different_texts(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill_module, "key_of", lambda text, seed: (0, key_of(text, seed)[1]))
    files = job([[("de", "eins"), ("de", "zwei")], [("de", "drei"), ("de", "zwei")]]).tokenise()
    assert files.num_documents() == {"de": 3}
    assert files.counts()["de", "documents_duplicate"] == 1


def test_the_order_of_units_and_documents_changes_no_byte(job: Callable[..., Job]) -> None:
    units = [[(f"l{n % 3}", f"Text {n * n % 90}") for n in range(u, 120, 4)] for u in range(4)]
    one = job(units)
    other = job([unit[::-1] for unit in units[::-1]])
    one.tokenise()
    other.tokenise()
    for partition in range(4):
        assert (
            tokens_path(one.work, partition).read_bytes()
            == tokens_path(other.work, partition).read_bytes()
        )


def test_documents_lie_sorted_by_language_and_digest_with_their_ids(
    job: Callable[..., Job],
) -> None:
    made = job([[(f"l{n % 3}", f"Text {n} of some length."[: 6 + n % 19]) for n in range(100)]])
    files = made.tokenise()
    for partition in range(4):
        table = files.documents(partition)
        order = table[["language", "hi", "lo"]].tolist()
        assert order == sorted(order)
        assert (table["offset"] == np.cumsum(table["tokens"]) - table["tokens"]).all()
        assert len(files.tokens(partition)) == table["tokens"].sum()
    for _, text, record in made.documents(files):
        assert (record["hi"], record["lo"]) == key_of(text.encode(), 1)
        assert record["chars"] == len(text)


@pytest.mark.parametrize("batch", [1, 30, 300])
def test_batches_change_no_byte_and_are_bounded(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, letters: Any, batch: int
) -> None:
    units = [[("de", f"Wörter {n} " + "ä" * (n % 23)) for n in range(80)]]
    one, other = job(units), job(units)
    one.tokenise()
    encoded: list[list[int]] = []

    class Spy(type(letters)):
        def encode(self, texts: Sequence[str]) -> Any:
            encoded.append([len(text.encode()) for text in texts])
            return super().encode(texts)

    monkeypatch.setattr(tokens_module, "BATCH_BYTES", batch)
    other.tokenizer = Spy()
    other.tokenise()
    for partition in range(4):
        assert (
            tokens_path(one.work, partition).read_bytes()
            == tokens_path(other.work, partition).read_bytes()
        )
    assert all(sum(sizes) <= batch or len(sizes) == 1 for sizes in encoded)
    assert any(len(sizes) > 1 for sizes in encoded) == (batch > 1)


def test_known_and_similar_documents_go(job: Callable[..., Job], tmp_path: Path) -> None:
    texts = [f"Text {n}" for n in range(40)]
    made = job([[("de" if n % 2 else "en", text) for n, text in enumerate(texts)]])
    keys = [key_of(text.encode(), 1) for text in texts]
    strange = key_of(b"a text that is not there", 1)
    known = np.sort(np.array([*keys[:5], strange], dtype=KEY))
    # one is both known and similar, one is told of twice
    similar = verdicts(tmp_path / "similar", [*keys[4:9], keys[8], strange], KEY)
    files = made.tokenise(Removals(known, similar))
    assert sorted(text for _, text in made.texts(files)) == sorted(texts[9:])
    assert +files.counts() == {
        ("de", "documents_duplicate"): 2,
        ("de", "chars_duplicate"): 12,
        ("en", "documents_duplicate"): 3,
        ("en", "chars_duplicate"): 18,
        ("de", "documents_near_duplicate"): 2,
        ("de", "chars_near_duplicate"): 12,
        ("en", "documents_near_duplicate"): 2,
        ("en", "chars_near_duplicate"): 12,
    }
    assert_all_is_counted(made, files)


def test_lines_of_other_documents_go(job: Callable[..., Job], tmp_path: Path) -> None:
    pages = ["Menu\nNews of today\nFooter", "Menu\nFooter", "Menu\n~\nFooter", "Plain\ntext"]
    made = job([[("de", page) for page in pages]])
    keys = [key_of(page.encode(), 1) for page in pages]
    goes = [(*key, line) for key, number in zip(keys, (3, 2, 3), strict=False)
            for line in (0, number - 1)]  # fmt: skip
    lines = verdicts(tmp_path / "lines", goes, LINE)
    files = made.tokenise(Removals(np.zeros(0, KEY), lines=lines))
    assert made.texts(files) == [("de", "News of today"), ("de", "Plain text")]
    assert +files.counts() == {
        ("de", "chars_duplicate_line"): 12 + 11 + 12,  # with the breaks that go
        ("de", "documents_duplicate_line"): 1,  # nothing is left of it
        ("de", "documents_no_tokens"): 1,
        ("de", "chars_no_tokens"): 1,
    }
    assert_all_is_counted(made, files)


def test_statistics_are_of_the_documents_that_stay(job: Callable[..., Job]) -> None:
    made = job([[("de" if n % 3 else "en", "x" * n + f"{n}") for n in range(90)], [("sw", "~")]])
    files = made.tokenise()
    numbers = collections.Counter(language for language, *_ in made.documents(files))
    assert files.num_documents() == {"sw": 0, **numbers}
    expected = {name: [[0] * DRAWS] for name in ("de", "en")}  # nothing is left of the other
    for language, text, record in made.documents(files):
        pieces = -(-len(text) // 14)
        expected[language][0][int(record["lo"]) * DRAWS >> 64] += len(text) + 2 * pieces
    assert {name: found.tolist() for name, found in files.draws().items()} == expected


@given(st.lists(st.integers(0, 5000)), st.integers(8, 600))
def test_framed_counts_the_frame_of_each_piece(tokens: list[int], seq_len: int) -> None:
    def naive(left: int) -> int:
        total = 0
        while left:
            piece = min(left, seq_len - 2)
            left -= piece
            total += piece + 2
        return total

    found = framed(np.array(tokens, dtype="<u4"), seq_len)
    assert found.tolist() == [naive(number) for number in tokens]


def test_a_finished_partition_is_not_done_again(job: Callable[..., Job], letters: Any) -> None:
    made = job([[("de", "Text")]])
    made.tokenise()

    class Refuses(type(letters)):
        def encode(self, texts: Sequence[str]) -> Any:
            pytest.fail("tokenised again")

    made.tokenizer = Refuses()
    made.tokenise()


def test_no_documents_are_no_ids(job: Callable[..., Job]) -> None:
    files = job([]).tokenise()
    assert (files.counts(), files.num_documents(), files.draws()) == (Counts(), {}, {})
    assert len(files.documents(0)) == len(files.tokens(0)) == 0
