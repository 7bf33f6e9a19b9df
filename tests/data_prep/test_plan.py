from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import plan as plan_module
from data_prep.config import Prep
from data_prep.pack import FRAME, Segment
from data_prep.plan import DOCUMENT, Plan, balance, block_slices, make_plan

PREP = Prep(seq_len=32, smoothing=0.3, heldout_rows=3)


def corpus(sizes: dict[str, int], *, seed: int = 0, longest: int = 100) -> npt.NDArray[np.void]:
    """So many documents of each language, of random lengths, at made-up places of two files."""
    rng = np.random.default_rng(seed)
    documents = np.zeros(sum(sizes.values()), dtype=DOCUMENT)
    offset = 0
    languages = [language for language, n in sizes.items() for _ in range(n)]
    for i, language in enumerate(languages):
        tokens = int(rng.integers(1, longest))
        key = hashlib.sha256(f"{seed}/{i}".encode()).digest()[:16]
        documents[i] = (key, language, tokens, 4 * tokens + int(rng.integers(3)), i % 2, offset)
        offset += tokens
    return documents


def kept_tokens(plan: Plan, rows: list[list[Segment]]) -> collections.Counter[tuple[int, int]]:
    return collections.Counter(
        (s.document, token)
        for row in rows
        for s in row
        for token in range(s.start, s.start + s.length)
    )


def content(plan: Plan) -> dict[str, int]:
    """Tokens to train on of each language, without frames."""
    totals: dict[str, int] = {}
    for row in plan.train:
        for segment in row:
            language = plan.documents["language"][segment.document].decode()
            totals[language] = totals.get(language, 0) + segment.length
    return totals


@pytest.mark.parametrize("seed", [0, 1])
def test_the_plan_does_not_depend_on_the_order_of_documents(seed: int) -> None:
    documents = corpus({"de": 300, "en": 700, "sw": 40})
    plan = make_plan(documents, PREP, seed)
    shuffled = documents[np.random.default_rng(seed).permutation(len(documents))]
    other = make_plan(shuffled, PREP, seed)
    assert (other.train, other.heldout, other.dropped) == (plan.train, plan.heldout, plan.dropped)
    np.testing.assert_array_equal(other.documents, plan.documents)


def test_the_seed_decides_the_order_and_what_is_held_out() -> None:
    documents = corpus({"de": 300, "en": 700})
    one, two = (make_plan(documents, PREP, seed) for seed in (1, 2))
    assert one.train != two.train
    assert one.heldout != two.heldout


def test_rows_are_shuffled_across_the_whole_corpus() -> None:
    documents = corpus({"de": 500, "en": 500})
    plan = make_plan(documents, dataclasses.replace(PREP, smoothing=1.0), 1)
    of_row = [plan.documents["language"][row[0].document] == b"de" for row in plan.train]
    half = len(of_row) // 2
    assert 0.3 < np.mean(of_row[:half]) < 0.7
    # best fit fills rows from the longest segment down; the order of rows must not show it
    lengths = [len(row) for row in plan.train]
    assert abs(np.mean(lengths[:half]) - np.mean(lengths[half:])) < 0.5


def test_segments_are_shuffled_before_they_are_packed_window_by_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 50)
    documents = corpus({"de": 500, "en": 500}, longest=12)
    plan = make_plan(documents, dataclasses.replace(PREP, smoothing=1.0), 1)
    languages = [{plan.documents["language"][s.document] for s in row} for row in plan.train]
    assert np.mean([len(mixed) == 2 for mixed in languages]) > 0.5
    assert sum(content(plan).values()) == pytest.approx(documents["tokens"].sum(), rel=0.05)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.7, 1.0])
def test_shares_of_languages_are_smoothed_to_within_a_document(smoothing: float) -> None:
    longest = 100
    documents = corpus({"a": 3000, "b": 600, "c": 40}, longest=longest)
    plan = make_plan(documents, dataclasses.replace(PREP, smoothing=smoothing, heldout_rows=0), 1)
    n = {name: int(documents["tokens"][documents["language"] == name.encode()].sum())
         for name in "abc"}  # fmt: skip
    weights = {name: n[name] ** smoothing for name in n}
    for name, kept in content(plan).items():
        quota = sum(n.values()) * weights[name] / sum(weights.values())
        assert quota - longest <= kept <= quota + 1


@given(st.integers(0, 10_000))
def test_smoothing_1_keeps_each_document_exactly_once(seed: int) -> None:
    documents = corpus({"a": 60, "b": 9, "c": 1}, seed=seed)
    plan = make_plan(documents, Prep(seq_len=32, smoothing=1.0), seed)
    every = [(d, t) for d in range(len(plan.documents)) for t in range(plan.documents["tokens"][d])]
    assert kept_tokens(plan, plan.train) == collections.Counter(every)
    assert not plan.dropped


def test_poor_languages_are_repeated_whole_times_and_a_rest() -> None:
    plan = make_plan(corpus({"a": 3000, "c": 40}), dataclasses.replace(PREP, heldout_rows=0), 1)
    times = collections.Counter()
    for (document, _), n in kept_tokens(plan, plan.train).items():
        if plan.documents["language"][document] == b"c":
            times[document] = n
    assert len(times) == 40
    assert max(times.values()) - min(times.values()) == 1
    assert min(times.values()) > 1


def test_a_language_keeps_a_document_however_small_its_quota_is() -> None:
    documents = corpus({"a": 50, "b": 1})
    documents["tokens"][-1] = 10_000
    plan = make_plan(documents, Prep(seq_len=32, smoothing=0.0), 1)
    assert content(plan)["b"] == 10_000


def test_held_out_rows_are_as_many_as_asked_and_full() -> None:
    plan = make_plan(corpus({"a": 200, "b": 200, "c": 2, "d": 1}), PREP, 1)
    assert {name: len(rows) for name, rows in plan.heldout.items() if name in "ab"} == {
        "a": 3,
        "b": 3,
    }
    for name in "ab":
        for row in plan.heldout[name]:
            assert sum(s.length + FRAME for s in row) > PREP.seq_len - 5
            assert sum(s.length + FRAME for s in row) <= PREP.seq_len
            assert {plan.documents["language"][s.document] for s in row} == {name.encode()}


def test_no_document_is_both_held_out_and_trained_on() -> None:
    plan = make_plan(corpus({"a": 200, "b": 30, "c": 2}), PREP, 1)
    heldout = {s.document for rows in plan.heldout.values() for row in rows for s in row}
    trained = {s.document for row in plan.train for s in row}
    assert heldout
    assert not heldout & trained


def test_held_out_tokens_are_there_once() -> None:
    plan = make_plan(corpus({"a": 200}), PREP, 1)
    assert set(kept_tokens(plan, plan.heldout["a"]).values()) == {1}


def test_a_language_of_one_document_is_trained_on_and_not_held_out() -> None:
    plan = make_plan(corpus({"a": 200, "d": 1}), PREP, 1)
    assert plan.heldout["d"] == []
    assert content(plan)["d"] > 0


def test_at_most_half_of_the_documents_are_held_out() -> None:
    plan = make_plan(corpus({"a": 10}), dataclasses.replace(PREP, heldout_rows=1000), 1)
    assert len({s.document for row in plan.heldout["a"] for s in row}) == 5


def test_copies_are_dropped_and_the_first_language_keeps_the_text() -> None:
    documents = corpus({"b": 3, "a": 3})
    for copy, original in ((3, 0), (2, 1)):  # a's first is b's first, b's third is b's second
        for field in ("key", "tokens", "chars"):
            documents[field][copy] = documents[field][original]
    plan = make_plan(documents, Prep(seq_len=32, smoothing=1.0), 1)
    assert sorted(plan.documents["language"].tolist()) == [b"a", b"a", b"a", b"b"]
    assert plan.dropped["b", "documents_duplicate"] == 2
    chars = documents["chars"]
    assert plan.dropped["b", "chars_duplicate"] == chars[0] + chars[1]


def test_documents_without_tokens_are_dropped() -> None:
    documents = corpus({"a": 3})
    documents["tokens"][1] = 0
    plan = make_plan(documents, Prep(seq_len=32), 1)
    assert plan.dropped == {
        ("a", "documents_no_tokens"): 1,
        ("a", "chars_no_tokens"): documents["chars"][1],
    }


def test_no_documents_are_no_rows() -> None:
    plan = make_plan(np.zeros(0, dtype=DOCUMENT), PREP, 1)
    assert (plan.train, plan.heldout, plan.kept()) == ([], {}, {})


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 4))
def test_every_character_is_kept_or_dropped_by_one_rule(
    seed: int, smoothing: float, heldout_rows: int
) -> None:
    documents = corpus({"a": 60, "b": 9, "c": 1}, seed=seed)
    documents["key"][5] = documents["key"][50]
    documents["tokens"][6] = 0
    prep = Prep(seq_len=32, smoothing=smoothing, heldout_rows=heldout_rows)
    plan = make_plan(documents, prep, seed)
    for what in ("chars", "documents"):
        total = collections.Counter()
        for counts in (plan.dropped, plan.kept()):
            for (language, rule), n in counts.items():
                if rule.startswith(what):
                    total[language] += n
        for name in "abc":
            of_language = documents[documents["language"] == name.encode()]
            number = len(of_language) if what == "documents" else int(of_language["chars"].sum())
            assert total[name] == number


def test_kept_notices_text_that_went_missing() -> None:
    plan = make_plan(corpus({"a": 200}), PREP, 1)
    less = dataclasses.replace(plan, train=plan.train[1:])
    assert less.kept()["a", "chars_train"] < plan.kept()["a", "chars_train"]


def test_tokens_counts_segments_with_their_frames() -> None:
    plan = make_plan(corpus({"a": 20, "b": 20}), PREP, 1)
    num_segments = sum(len(row) for row in plan.train)
    assert sum(plan.tokens().values()) == sum(content(plan).values()) + FRAME * num_segments
    assert plan.tokens().keys() == {"a", "b"}


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 5))
def test_block_slices_cover_the_rows_and_only_the_last_is_short(
    num_rows: int, rows_per_block: int, blocks_per_shard: int
) -> None:
    prep = Prep(rows_per_block=rows_per_block, blocks_per_shard=blocks_per_shard)
    shards = block_slices(num_rows, prep)
    blocks = [block for shard in shards for block in shard]
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_rows))
    assert all(stop - start == rows_per_block for start, stop in blocks[:-1])
    assert all(len(shard) == blocks_per_shard for shard in shards[:-1])
    assert all(shards)


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 6))
def test_balance_gives_every_item_to_one_rank_evenly(sizes: list[int], num_ranks: int) -> None:
    shares = balance(sizes, num_ranks)
    assert sorted(item for share in shares for item in share) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
