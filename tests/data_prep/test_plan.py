from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import plan as plan_module
from data_prep.config import Prep
from data_prep.container import Container
from data_prep.exchange import KEY
from data_prep.mixing import Dose, doses
from data_prep.pack import FRAME
from data_prep.plan import (
    Groups,
    HeldOut,
    Rows,
    block_slices,
    plan_group,
    rows_path,
    take_heldout,
)
from data_prep.spill import Counts, Spills
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import DRAWS, TOKENISED, Removals, TokenFiles, tokenise, tokens_path

PREP = Prep(seq_len=32, smoothing=0.3, heldout_rows=3)
Document = tuple[int, int]  # partition, and where its ids begin there
Token = tuple[int, int]  # partition and place


class Corpus:
    """So many documents of each language, of random words and digests, as TokenFiles has them."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        of: int = 8,
        seed: int = 0,
        shortest: int = 1,
        longest: int = 100,
        pools: int = 1,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._pools = pools
        self.languages = sorted(sizes)
        rows: list[list[tuple[int, ...]]] = [[] for _ in range(of)]
        for place, language in enumerate(self.languages):
            for _ in range(sizes[language]):
                hi, lo = rng.integers(0, 2**64, 2, dtype=np.uint64).tolist()
                tokens = int(rng.integers(shortest, longest))
                chars = 4 * tokens + int(rng.integers(3))
                pool = lo % pools
                rows[hi * of >> 64].append((hi, lo, place, pool, chars, tokens, 0))
        self._tables = [
            np.sort(np.array(part, TOKENISED), order=["language", "hi"]) for part in rows
        ]
        self._ids = []
        for table in self._tables:
            table["offset"] = np.cumsum(table["tokens"]) - table["tokens"]
            number = int(table["tokens"].sum())
            self._ids.append(np.where(rng.random(number) < 0.3, ord(" "), ord("x")))

    def __len__(self) -> int:
        return len(self._tables)

    def documents(self, partition: int) -> np.ndarray:
        return self._tables[partition]

    def tokens(self, partition: int) -> np.ndarray:
        return self._ids[partition]

    @functools.cached_property
    def all(self) -> dict[Document, np.void]:
        return {
            (partition, int(record["offset"])): record
            for partition, table in enumerate(self._tables)
            for record in table
        }

    def name(self, record: np.void) -> str:
        return self.languages[record["language"]]

    def num_documents(self) -> dict[str, int]:
        return {
            name: sum(int((t["language"] == place).sum()) for t in self._tables)
            for place, name in enumerate(self.languages)
        }

    def draws(self) -> dict[str, np.ndarray]:
        found = {name: np.zeros((self._pools, DRAWS), np.int64) for name in self.languages}
        for record in self.all.values():
            framed = int(record["tokens"]) + FRAME * -(-int(record["tokens"]) // (PREP.seq_len - 2))
            found[self.name(record)][record["pool"], int(record["lo"]) >> 54] += framed
        return found


@dataclasses.dataclass
class Plan:
    """All rows of a corpus."""

    corpus: Any
    groups: list[Rows]
    held: HeldOut
    doses: dict[str, list[Dose]]
    facts: list[dict[str, Any]]

    @property
    def train(self) -> list[list[tuple[int, ...]]]:
        return [rows[row].tolist() for rows in self.groups for row in range(len(rows))]

    @property
    def counts(self) -> Counts:
        total = Counts(self.held.counts)
        for fact in self.facts:
            total.update(Counts.from_json(fact["counts"]))
        return total

    def heldout(self, language: str) -> list[list[tuple[int, ...]]]:
        rows = self.held.rows[language]
        return [rows[row].tolist() for row in range(len(rows))]


@pytest.fixture(scope="session")
def plan(letters: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """Plans a corpus in so many groups, as the stages of preparation do."""

    def run(
        corpus: Any,
        prep: Prep = PREP,
        *,
        seed: int = 1,
        groups: int = 2,
        dosed: dict[str, list[Dose]] | None = None,
        tokenizer: Any = letters,
    ) -> Plan:
        work = tmp_path_factory.mktemp("rows")
        there = corpus.num_documents()
        held = take_heldout(corpus, prep, [name for name in there if there[name]])
        draws = corpus.draws()
        for language, taken in held.draws.items():
            draws[language] -= taken
        left = {name: of_draw for name, of_draw in draws.items() if of_draw.any()}
        dosed = doses(left, prep) if dosed is None else dosed
        bounds = Groups.of(len(corpus), groups * plan_module.GROUP_TOKENS)
        paths = [rows_path(work, group) for group in range(len(bounds))]
        for group, path in enumerate(paths):
            plan_group(corpus, bounds[group], path, dosed, held.until, prep, tokenizer, seed)
        files = [Container(path) for path in paths]
        return Plan(corpus, [Rows.load(f) for f in files], held, dosed, [f.facts for f in files])

    return run


def tokens_of(rows: Sequence[Sequence[tuple[int, ...]]]) -> collections.Counter[Token]:
    return collections.Counter(
        (partition, token)
        for row in rows
        for partition, _, length, offset in row
        for token in range(offset, offset + length)
    )


def times_trained(found: Plan) -> dict[Document, int]:
    """How often each document is in the rows to train on, which has to be wholly."""
    tokens = tokens_of(found.train)
    times = {}
    for (partition, offset), record in found.corpus.all.items():
        of_token = {tokens[partition, offset + i] for i in range(int(record["tokens"]))}
        assert len(of_token) == 1
        times[partition, offset] = of_token.pop()
    assert sum(n * int(found.corpus.all[d]["tokens"]) for d, n in times.items()) == sum(
        tokens.values()
    )
    return times


def heldout_documents(found: Plan) -> set[Document]:
    tokens = {token for name in found.held.rows for token in tokens_of(found.heldout(name))}
    return {
        (partition, offset)
        for (partition, offset), record in found.corpus.all.items()
        if any((partition, offset + i) in tokens for i in range(int(record["tokens"])))
    }


def test_rows_fit_and_segments_stay_in_their_document(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 200, "b": 30}, longest=200))
    owner = {
        (partition, offset + i): ((partition, offset), record["language"])
        for (partition, offset), record in found.corpus.all.items()
        for i in range(int(record["tokens"]))
    }
    for row in [*found.train, *found.heldout("a"), *found.heldout("b")]:
        assert row
        assert sum(length + FRAME for _, _, length, _ in row) <= PREP.seq_len
        for partition, language, length, offset in row:
            documents = {owner[partition, offset + i] for i in range(length)}
            ((_, of_document),) = documents
            assert of_document == language


def test_the_seed_decides_the_order_and_nothing_else(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 300, "b": 700}, longest=28)
    one, again, other = (plan(corpus, seed=seed) for seed in (1, 1, 2))
    assert one.train == again.train
    assert one.train != other.train
    assert tokens_of(one.train) == tokens_of(other.train)
    assert one.counts == other.counts


def test_digests_decide_what_is_held_out(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 100}, of=1)
    found = plan(corpus)
    first = {
        document
        for document, record in corpus.all.items()
        if tuple(record[["hi", "lo"]]) <= found.held.until["a"]
    }
    assert heldout_documents(found) == first
    assert plan(Corpus({"a": 100}, of=16)).held.until == found.held.until


@pytest.mark.parametrize("groups", [1, 8])
def test_rows_are_shuffled_across_the_whole_corpus(plan: Callable[..., Plan], groups: int) -> None:
    corpus = Corpus({"a": 500, "b": 500})
    train = plan(corpus, dataclasses.replace(PREP, smoothing=1.0), groups=groups).train
    of_row = [row[0][1] == 0 for row in train]
    half = len(of_row) // 2
    assert 0.3 < np.mean(of_row[:half]) < 0.7
    # best fit fills rows from the longest segment down; the order of rows must not show it
    lengths = [len(row) for row in train]
    assert abs(np.mean(lengths[:half]) - np.mean(lengths[half:])) < 0.5


def test_segments_are_shuffled_before_they_are_packed_window_by_window(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 50)
    corpus = Corpus({"a": 500, "b": 500}, longest=12)
    found = plan(corpus, Prep(seq_len=32, smoothing=1.0))
    languages = [{language for _, language, *_ in row} for row in found.train]
    assert np.mean([len(mixed) == 2 for mixed in languages]) > 0.5
    assert set(times_trained(found).values()) == {1}


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.dictionaries(
        st.sampled_from("abc"),
        st.lists(st.builds(Dose, st.integers(0, 4), st.integers(0, DRAWS)), min_size=2, max_size=2),
    ),
    st.integers(0, 3),
    st.sampled_from([1, 2, 8]),
)
def test_each_document_is_in_the_rows_as_often_as_its_dose_says(
    plan: Callable[..., Plan], seed: int, dosed: dict[str, list[Dose]], heldout_rows: int, of: int
) -> None:
    corpus = Corpus({"a": 50, "b": 9, "c": 1}, seed=seed, of=of, pools=2)
    prep = dataclasses.replace(PREP, heldout_rows=heldout_rows, source_weights={"some": 2.0})
    found = plan(corpus, prep, dosed=dosed, groups=of)
    heldout = heldout_documents(found)
    for document, times in times_trained(found).items():
        record = corpus.all[document]
        dose = dosed.get(corpus.name(record), [Dose(0, 0)] * 2)[record["pool"]]
        once_more = int(record["lo"]) * DRAWS >> 64 < dose.draw
        assert times == (0 if document in heldout else dose.copies + once_more)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.7, 1.0])
def test_shares_of_languages_are_smoothed_to_within_a_draw(
    plan: Callable[..., Plan], smoothing: float
) -> None:
    corpus = Corpus({"a": 3000, "b": 600, "c": 40}, longest=30)  # no document is cut
    prep = Prep(seq_len=32, smoothing=smoothing, max_repeats=100.0)
    found = plan(corpus, prep)
    draws = corpus.draws()
    tokens: collections.Counter[str] = collections.Counter()
    for document, times in times_trained(found).items():
        record = corpus.all[document]
        tokens[corpus.name(record)] += times * (int(record["tokens"]) + FRAME)
    there = {name: int(of_draw.sum()) for name, of_draw in draws.items()}
    weights = {name: n**smoothing for name, n in there.items()}
    for name, kept in tokens.items():
        quota = sum(there.values()) * weights[name] / sum(weights.values())
        assert quota - draws[name].max() - 1 <= kept <= quota + 1


def test_poor_languages_are_repeated_whole_times_and_a_rest(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 3000, "c": 40})
    found = plan(corpus, Prep(seq_len=32, smoothing=0.3, max_repeats=100.0))
    times = {
        n for document, n in times_trained(found).items()
        if corpus.name(corpus.all[document]) == "c"
    }  # fmt: skip
    assert max(times) - min(times) == 1
    assert min(times) > 1


@pytest.mark.parametrize("prep", [PREP, Prep(seq_len=32, smoothing=1.0)])
def test_how_many_groups_there_are_does_not_change_what_is_in_the_rows(
    plan: Callable[..., Plan], prep: Prep
) -> None:
    corpus = Corpus({"a": 300, "b": 40, "c": 2}, of=16)
    one = plan(corpus, prep, groups=1)
    for groups in (2, 3, 16):
        other = plan(corpus, prep, groups=groups)
        assert len(other.groups) == groups
        assert tokens_of(other.train) == tokens_of(one.train)
        assert other.counts == one.counts
        assert other.heldout("a") == one.heldout("a")


def test_copies_are_far_from_each_other(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 100}, of=16)
    found = plan(corpus, Prep(seq_len=32), dosed={"a": [Dose(3, 0)]}, groups=4)
    in_group = [
        set(tokens_of([rows[row].tolist() for row in range(len(rows))])) for rows in found.groups
    ]
    for token in tokens_of(found.train):
        assert sum(token in tokens for tokens in in_group) == 3


def test_more_copies_than_partitions_are_all_there(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 30}, of=2)
    found = plan(corpus, Prep(seq_len=32), dosed={"a": [Dose(7, 0)]})
    assert set(times_trained(found).values()) == {7}


@given(st.integers(1, 200), st.integers(0, 300))
def test_groups_cover_all_partitions_in_order(num_partitions: int, fills: int) -> None:
    groups = Groups.of(num_partitions, fills * plan_module.GROUP_TOKENS)
    partitions = [list(groups[group]) for group in range(len(groups))]
    assert list(itertools.chain.from_iterable(partitions)) == list(range(num_partitions))
    assert len(groups) == max(1, min(num_partitions, fills))
    assert max(map(len, partitions)) - min(map(len, partitions)) <= 1


def test_held_out_rows_are_as_many_as_asked_and_full(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 200, "b": 200, "c": 2, "d": 1}))
    for place, name in enumerate("ab"):
        rows = found.heldout(name)
        assert len(rows) == 3
        for row in rows:
            assert sum(length + FRAME for *_, length, _ in row) > PREP.seq_len - 5
            assert {language for _, language, *_ in row} == {place}


def test_no_document_is_both_held_out_and_trained_on(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 200, "b": 30, "c": 2}))
    heldout = heldout_documents(found)
    assert heldout
    times = times_trained(found)
    assert all(times[document] == 0 for document in heldout)
    assert all(times[document] > 0 for document in times if document not in heldout
               and found.corpus.name(found.corpus.all[document]) != "a")  # fmt: skip


def test_held_out_tokens_are_there_once(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 200}))
    assert set(tokens_of(found.heldout("a")).values()) == {1}


def test_the_rest_of_the_last_held_out_document_is_counted(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 20}, longest=400)
    found = plan(corpus, dataclasses.replace(PREP, heldout_rows=2))
    taken = [corpus.all[document] for document in heldout_documents(found)]
    left_over = sum(int(r["tokens"]) for r in taken) - len(tokens_of(found.heldout("a")))
    (last,) = (r for r in taken if tuple(r[["hi", "lo"]]) == found.held.until["a"])
    assert left_over > 0
    remainder = round(left_over / int(last["tokens"]) * int(last["chars"]))
    assert found.counts["a", "chars_heldout_remainder"] == remainder
    assert found.counts["a", "chars_heldout"] == sum(int(r["chars"]) for r in taken) - remainder
    assert found.counts["a", "documents_heldout"] == len(taken)


def test_what_is_held_out_is_no_longer_there_to_train_on(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 50, "b": 60})
    found = plan(corpus)
    left = {name: np.zeros((1, DRAWS), np.int64) for name in "ab"}
    for document in heldout_documents(found):
        record = corpus.all[document]
        tokens = int(record["tokens"])
        left[corpus.name(record)][0, int(record["lo"]) >> 54] += tokens + FRAME * -(-tokens // 30)
    for name in "ab":
        np.testing.assert_array_equal(found.held.draws[name], left[name])


def test_a_language_of_one_document_is_trained_on_and_not_held_out(
    plan: Callable[..., Plan],
) -> None:
    corpus = Corpus({"a": 200, "d": 1})
    found = plan(corpus)
    assert found.heldout("d") == []
    assert "d" not in found.held.until
    (only,) = (document for document, r in corpus.all.items() if corpus.name(r) == "d")
    assert times_trained(found)[only] > 0


@pytest.mark.parametrize("number", [2, 9, 10])
def test_at_most_half_of_the_documents_are_held_out(plan: Callable[..., Plan], number: int) -> None:
    found = plan(Corpus({"a": number}), dataclasses.replace(PREP, heldout_rows=1000))
    assert len(heldout_documents(found)) == number // 2
    assert found.counts["a", "chars_heldout_remainder"] == 0


def test_only_the_named_languages_are_held_out() -> None:
    held = take_heldout(Corpus({"a": 50, "b": 50}), PREP, ["b"])
    assert list(held.rows) == list(held.until) == list(held.draws) == ["b"]


def test_no_held_out_rows_hold_nothing_out() -> None:
    held = take_heldout(Corpus({"a": 50}), dataclasses.replace(PREP, heldout_rows=0), ["a"])
    assert (len(held.rows["a"]), held.until, held.counts) == (0, {}, Counts())
    assert not held.draws["a"].any()


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 4),
    st.sampled_from([None, {"a": 0.0}, {"b": 3.0}]),
    st.sampled_from([None, 500]),
)
def test_every_character_is_kept_or_dropped_by_one_rule(
    plan: Callable[..., Plan],
    seed: int,
    smoothing: float,
    heldout_rows: int,
    weights: dict[str, float] | None,
    max_tokens: int | None,
) -> None:
    corpus = Corpus({"a": 60, "b": 9, "c": 1}, seed=seed)
    prep = Prep(
        seq_len=32,
        smoothing=smoothing,
        heldout_rows=heldout_rows,
        weights=weights,
        max_tokens=max_tokens,
    )
    found = plan(corpus, prep)
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    for (language, rule), number in found.counts.items():
        totals[language, rule.partition("_")[0]] += number
    expected: collections.Counter[tuple[str, str]] = collections.Counter()
    trained: collections.Counter[str] = collections.Counter()
    times = times_trained(found)
    for document, record in corpus.all.items():
        expected[corpus.name(record), "documents"] += 1
        expected[corpus.name(record), "chars"] += int(record["chars"])
        trained[corpus.name(record)] += times[document] > 0
    assert totals == expected
    for name in "abc":
        assert found.counts[name, "documents_train"] == trained[name]


def test_max_tokens_bounds_the_rows(plan: Callable[..., Plan]) -> None:
    corpus = Corpus({"a": 3000, "b": 3000}, longest=30)
    prep = Prep(seq_len=32, smoothing=0.3, max_tokens=20_000)
    total = sum(length + FRAME for row in plan(corpus, prep).train for *_, length, _ in row)
    slack = sum(int(of_draw.max()) for of_draw in corpus.draws().values())
    assert 20_000 - slack <= total <= 20_000


def test_facts_count_segments_with_their_frames(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 40, "b": 40, "c": 3}))
    tokens: collections.Counter[str] = collections.Counter()
    lengths: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in found.train:
        for _, language, length, _ in row:
            name = found.corpus.languages[language]
            tokens[name] += length + FRAME
            lengths[name][str(1 << (len(f"{length + FRAME:b}") - 1))] += 1
    total: collections.Counter[str] = collections.Counter()
    summed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for facts in found.facts:
        total.update(facts["tokens"])
        for name, of_language in facts["lengths"].items():
            summed[name].update(of_language)
    assert (total, summed) == (tokens, lengths)


@pytest.mark.parametrize(
    ("shortest", "longest"),
    [(1000, 2000), (70, 90)],  # cut because they are longer than a row, or to fill the rows' holes
)
def test_pieces_of_documents_begin_with_words(
    plan: Callable[..., Plan], shortest: int, longest: int
) -> None:
    corpus = Corpus({"a": 200}, shortest=shortest, longest=longest)
    prep = Prep(seq_len=128, smoothing=1.0)
    inside = [
        corpus.tokens(partition)[offset] == ord(" ")
        for row in plan(corpus, prep).train
        for partition, _, _, offset in row
        if (partition, offset) not in corpus.all
    ]
    assert len(inside) > 50
    assert np.mean(inside) > 0.75  # a word starts with 3 of 10 tokens


def test_a_finished_group_is_not_planned_again(tmp_path: Path) -> None:
    rows_path(tmp_path, 0).write_bytes(b"rows")
    plan_group(Corpus({}), range(1), rows_path(tmp_path, 0), {}, {}, PREP, None, 1)
    assert rows_path(tmp_path, 0).read_bytes() == b"rows"


def test_a_group_without_documents_has_no_rows(plan: Callable[..., Plan]) -> None:
    found = plan(Corpus({"a": 1}, of=8), groups=8)
    assert sorted(map(len, found.groups))[:7] == [0] * 7
    assert sum(map(len, found.groups)) > 0


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 5))
def test_block_slices_cover_the_rows_and_only_the_last_is_short_and_alone(
    num_rows: int, rows_per_block: int, blocks_per_shard: int
) -> None:
    prep = Prep(rows_per_block=rows_per_block, blocks_per_shard=blocks_per_shard)
    shards = block_slices(num_rows, prep)
    blocks = [block for shard in shards for block in shard]
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_rows))
    assert all(stop - start == rows_per_block for start, stop in blocks[:-1])
    whole = shards
    if num_rows % rows_per_block:
        *whole, last = shards
        assert last == [(num_rows - num_rows % rows_per_block, num_rows)]
    assert all(len(shard) == blocks_per_shard for shard in whole[:-1])
    assert all(1 <= len(shard) <= blocks_per_shard for shard in whole)


def test_real_text_fills_its_rows_and_is_cut_between_words(
    plan: Callable[..., Plan],
    spill_units: Callable[..., Spills],
    tokenizer: Tokenizer,
    corpus: Path,
    tmp_path: Path,
) -> None:
    units = []
    for language in ("en", "sw", "ar", "ru"):
        with gzip.open(corpus / f"{language}.jsonl.gz") as lines:
            records = [json.loads(line) for line in itertools.islice(lines, 80)]
        units.append([(language, " ".join(record["text"].split())) for record in records])
    spills = spill_units(tmp_path, units)
    paths = [tokens_path(tmp_path, partition) for partition in range(4)]
    for partition, path in enumerate(paths):
        tokenise(spills, partition, path, Prep(), tokenizer, Removals(np.zeros(0, KEY)))
    files = TokenFiles(paths, spills.languages)
    found = plan(files, Prep(smoothing=1.0), groups=1, tokenizer=tokenizer)
    train = found.train
    used = sum(length + FRAME for row in train for *_, length, _ in row)
    assert used / (len(train) * 512) >= 0.995
    begins = {
        (partition, start)
        for partition in range(4)
        for start in files.documents(partition)["offset"].tolist()
    }
    inside = [
        bool(tokenizer.starts_word[files.tokens(partition)[offset]])
        for row in train
        for partition, _, _, offset in row
        if (partition, offset) not in begins
    ]
    assert len(inside) > 100
    assert np.mean(inside) >= 0.99
