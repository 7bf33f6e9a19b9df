from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_prep.command import ConfigError
from data_prep.config import Prep
from data_prep.mixing import Dose, doses, mix_table, quotas


def water_fill(tokens: dict[str, int], prep: Prep) -> dict[str, float]:
    """Quotas by bisection on the level to which every language is filled, its cap aside."""
    weights = {
        name: (prep.weights or {}).get(name, 1.0) * n**prep.smoothing
        for name, n in tokens.items()
        if n and (prep.weights or {}).get(name, 1.0)
    }
    caps = {name: prep.max_repeats * tokens[name] for name in weights}
    total = prep.max_tokens or sum(tokens[name] for name in weights)

    def filled(level: float) -> dict[str, float]:
        return {name: min(caps[name], level * weight) for name, weight in weights.items()}

    low, high = 0.0, max([caps[name] / weights[name] for name in weights], default=0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle).values()) < total else (low, middle)
    return filled(high)


tokens_of = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**7), min_size=1)
smoothings = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@given(tokens_of, smoothings, st.sampled_from([1.0, 1.5, 4.0, 100.0]), st.data())
def test_quotas_are_shares_filled_up_to_what_repeats_allow(
    tokens: dict[str, int], smoothing: float, max_repeats: float, data: st.DataObject
) -> None:
    weights = data.draw(
        st.none() | st.dictionaries(st.sampled_from(sorted(tokens)), st.sampled_from([0, 0.5, 3]))
    )
    max_tokens = data.draw(st.none() | st.integers(100, 10**8))
    prep = Prep(
        smoothing=smoothing, max_repeats=max_repeats, weights=weights, max_tokens=max_tokens
    )
    found, expected = quotas(tokens, prep), water_fill(tokens, prep)
    assert found.keys() == expected.keys()
    for name, quota in found.items():
        assert quota == pytest.approx(expected[name], abs=len(tokens) + 1, rel=1e-9)
        assert quota <= max_repeats * tokens[name] + 0.5


@given(tokens_of)
def test_without_smoothing_every_language_keeps_what_it_has(tokens: dict[str, int]) -> None:
    kept = {name: n for name, n in tokens.items() if n}
    assert quotas(tokens, Prep(smoothing=1.0)) == kept


def test_poor_languages_are_repeated_at_most_so_often() -> None:
    tokens = {"en": 1_000_000, "de": 100_000, "sw": 100}
    found = quotas(tokens, Prep(smoothing=0.0, max_repeats=2.5))
    assert (found["sw"], found["de"]) == (250, 250_000)
    assert found["en"] == sum(tokens.values()) - 250 - 250_000


def test_max_tokens_is_the_total_while_repeats_allow_it() -> None:
    tokens = {"en": 1000, "sw": 10}
    assert quotas(tokens, Prep(smoothing=1.0, max_tokens=505)) == {"en": 500, "sw": 5}
    assert quotas(tokens, Prep(smoothing=1.0, max_tokens=2020)) == {"en": 2000, "sw": 20}
    assert quotas(tokens, Prep(max_tokens=10**9, max_repeats=3.0)) == {"en": 3000, "sw": 30}


def test_weights_are_factors_on_shares_and_0_leaves_out() -> None:
    tokens = {"de": 1000, "en": 1000, "sw": 1000}
    found = quotas(tokens, Prep(weights={"en": 2.0, "sw": 0.0}))
    assert found == {"de": 667, "en": 1333}
    assert quotas(tokens, Prep(weights=dict.fromkeys(tokens, 0.0))) == {}


def test_a_weight_for_a_language_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prep\.weights names 'dee'.*the languages are de, en"):
        quotas({"de": 5, "en": 5}, Prep(weights={"de": 1.0, "dee": 2.0}))


sparse = st.lists(st.sampled_from([0, 0, 0, 1, 40, 700]), min_size=1, max_size=60)


@given(st.dictionaries(st.sampled_from("abc"), sparse, min_size=1), smoothings, st.booleans())
def test_doses_fall_short_of_the_quota_by_less_than_a_draw(
    draws: dict[str, list[int]], smoothing: float, is_capped: bool
) -> None:
    tokens = {name: sum(of_draw) for name, of_draw in draws.items()}
    assume(sum(tokens.values()))
    prep = Prep(smoothing=smoothing, max_tokens=sum(tokens.values()) // 3 if is_capped else None)
    found = doses({name: np.array(of_draw) for name, of_draw in draws.items()}, prep)
    wanted = quotas(tokens, prep)
    assert found.keys() == wanted.keys()
    for name, dose in found.items():
        taken = dose.copies * tokens[name] + sum(draws[name][: dose.draw])
        assert taken > 0
        if taken > wanted[name]:  # one draw, because there has to be something
            assert dose.copies == 0
            assert sum(draws[name][: dose.draw - 1]) == 0
        else:
            assert wanted[name] - taken < draws[name][dose.draw]


def test_a_language_keeps_a_document_however_small_its_quota_is() -> None:
    draws = {"a": np.full(1024, 10), "b": np.zeros(1024, dtype=int)}
    draws["b"][700] = 100_000  # more than the quota, and not in the first draw
    found = doses(draws, Prep(smoothing=0.0, max_tokens=100))
    assert found["b"] == Dose(copies=0, draw=701)


def test_what_is_there_once_is_taken_once() -> None:
    draws = {"a": np.arange(1024), "b": np.ones(1024, dtype=int)}
    for name, dose in doses(draws, Prep(smoothing=1.0)).items():
        assert dose.copies == 1
        assert draws[name][: dose.draw].sum() == 0


def test_the_table_says_what_there_is_and_what_is_taken() -> None:
    prep = Prep(smoothing=0.0, weights={"it": 0.0})
    tokens = {"en": 3_000_000.0, "sw": 1_000_000.0, "it": 500_000.0}
    head, en, it, sw = mix_table(tokens, prep, None).splitlines()
    assert head.split() == "language tokens share to train on share times".split()
    assert en.split() == ["en", "3,000,000", "66.7%", "2,000,000", "50.0%", "0.67"]
    assert it.split() == ["it", "500,000", "11.1%", "0", "0.0%", "0.00"]
    assert sw.split() == ["sw", "1,000,000", "22.2%", "2,000,000", "50.0%", "2.00"]
    assert len({len(line) for line in (head, en, it, sw)}) == 1
    estimated = mix_table(tokens, prep, {"en": 0.021, "sw": 0.5, "it": 0.0})
    assert "3,000,000 ±2%" in estimated
