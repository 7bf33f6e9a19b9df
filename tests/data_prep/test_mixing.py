from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_prep.command import ConfigError
from data_prep.config import Prep
from data_prep.mixing import Dose, check_mix, doses, mix_table, pool_quotas, quotas


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


def pools(**numbers: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(of_pools) for name, of_pools in numbers.items()}


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
    tokens, prep = pools(de=[5], en=[5]), Prep(weights={"de": 1.0, "dee": 2.0})
    with pytest.raises(ConfigError, match=r"prep\.weights names 'dee'.*the languages are de, en"):
        check_mix(tokens, prep)
    check_mix(tokens, prep, earlier=["dee"])


def test_weights_that_leave_nothing_are_refused() -> None:
    tokens = pools(de=[5, 0, 3], en=[0, 7, 0])
    left_out = {"a": 2.0, "b": 0.0}  # the pools are then a, other files, b
    tokens = {name: of_pools[[0, 2, 1]] for name, of_pools in tokens.items()}
    check_mix(tokens, Prep(source_weights=left_out))
    with pytest.raises(ConfigError, match=r"prep\.weights\.en=1\.5 asks for .*source_weights"):
        check_mix(tokens, Prep(source_weights=left_out, weights={"en": 1.5}))
    with pytest.raises(ConfigError, match=r"are 0 for all .* \(de, en\), so nothing"):
        check_mix(tokens, Prep(source_weights=left_out, weights={"de": 0.0}))


weights_of_pools = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 6.0]), min_size=1, max_size=3)


@given(weights_of_pools, st.sampled_from([0.3, 1.0]), st.sampled_from([1.0, 2.0, 50.0]), st.data())
def test_pools_share_their_language_by_weight_and_what_there_is(
    factors: list[float], smoothing: float, max_repeats: float, data: st.DataObject
) -> None:
    prep = Prep(
        smoothing=smoothing,
        max_repeats=max_repeats,
        source_weights={f"glob {i}": weight for i, weight in enumerate(factors)},
    )
    weights = [pool.weight for pool in prep.pools]
    numbers = st.lists(
        st.sampled_from([0, 3, 1000, 10**6]), min_size=len(weights), max_size=len(weights)
    )
    tokens = {name: np.array(data.draw(numbers)) for name in "ab"}
    used = {name: int((there * (np.array(weights) > 0)).sum()) for name, there in tokens.items()}
    of_languages = quotas(used, prep)
    found = pool_quotas(tokens, prep)
    assert found.keys() == of_languages.keys()
    for name, of_pools in found.items():
        there = {str(place): int(n) for place, n in enumerate(tokens[name])}
        expected = water_fill(  # pools are to a language what languages are to all
            there,
            Prep(
                smoothing=1.0,
                max_repeats=max_repeats,
                weights={str(place): weight for place, weight in enumerate(weights)},
                max_tokens=of_languages[name],
            ),
        )
        for place, quota in enumerate(of_pools):
            wanted = expected.get(str(place), 0)
            assert quota == pytest.approx(wanted, abs=len(weights) + 1, rel=1e-9)


def test_a_source_twice_the_weight_is_there_twice_as_often() -> None:
    prep = Prep(source_weights={"wiki/*": 2.0, "spam/*": 0.0}, smoothing=1.0)
    assert [pool.glob for pool in prep.pools] == ["wiki/*", "", "spam/*"]
    found = pool_quotas(pools(en=[100, 1000, 77], sw=[0, 50, 50]), prep)
    assert {name: of_pools.tolist() for name, of_pools in found.items()} == {
        "en": [183, 917, 0],  # 1100 in proportion 200 : 1000
        "sw": [0, 50, 0],
    }


sparse = st.lists(st.sampled_from([0, 0, 0, 1, 40, 700]), min_size=1, max_size=60)


@given(st.dictionaries(st.sampled_from("abc"), sparse, min_size=1), smoothings, st.booleans())
def test_doses_fall_short_of_the_quota_by_less_than_a_draw(
    draws: dict[str, list[int]], smoothing: float, is_capped: bool
) -> None:
    tokens = {name: sum(of_draw) for name, of_draw in draws.items()}
    assume(sum(tokens.values()))
    prep = Prep(smoothing=smoothing, max_tokens=sum(tokens.values()) // 3 if is_capped else None)
    found = doses({name: np.array([of_draw]) for name, of_draw in draws.items()}, prep)
    wanted = quotas(tokens, prep)
    assert found.keys() == wanted.keys()
    for name, (dose,) in found.items():
        taken = dose.copies * tokens[name] + sum(draws[name][: dose.draw])
        assert taken > 0
        if taken > wanted[name]:  # one draw, because there has to be something
            assert dose.copies == 0
            assert sum(draws[name][: dose.draw - 1]) == 0
        else:
            assert wanted[name] - taken < draws[name][dose.draw]


def test_a_language_keeps_a_document_however_small_its_quota_is() -> None:
    draws = {"a": np.full((1, 1024), 10), "b": np.zeros((1, 1024), dtype=int)}
    draws["b"][0, 700] = 100_000  # more than the quota, and not in the first draw
    found = doses(draws, Prep(smoothing=0.0, max_tokens=100))
    assert found["b"] == [Dose(copies=0, draw=701)]


def test_what_is_there_once_is_taken_once() -> None:
    draws = {"a": np.arange(1024)[None], "b": np.ones((1, 1024), dtype=int)}
    for name, (dose,) in doses(draws, Prep(smoothing=1.0)).items():
        assert dose.copies == 1
        assert draws[name][0, : dose.draw].sum() == 0


def test_a_pool_of_weight_0_gets_nothing_and_any_other_something() -> None:
    draws = {"a": np.full((3, 1024), 10)}
    prep = Prep(source_weights={"b": 0.0, "c": 1e-9})
    of_others, of_c, of_b = doses(draws, prep)["a"]
    assert (of_b, of_c) == (Dose(0, 0), Dose(0, 1))
    assert of_others == Dose(2, 0)


def test_the_table_says_what_there_is_and_what_is_taken() -> None:
    prep = Prep(smoothing=0.0, weights={"it": 0.0})
    tokens = pools(en=[3_000_000.0], sw=[1_000_000.0], it=[500_000.0])
    head, en, it, sw = mix_table(tokens, prep, None).splitlines()
    assert head.split() == "language tokens share to train on share times".split()
    assert en.split() == ["en", "3,000,000", "66.7%", "2,000,000", "50.0%", "0.67"]
    assert it.split() == ["it", "500,000", "11.1%", "0", "0.0%", "0.00"]
    assert sw.split() == ["sw", "1,000,000", "22.2%", "2,000,000", "50.0%", "2.00"]
    assert len({len(line) for line in (head, en, it, sw)}) == 1
    estimated = mix_table(tokens, prep, pools(en=[63_000.0**2], sw=[1e9], it=[0.0]))
    assert "3,000,000 ±2%" in estimated


def test_the_table_says_what_is_taken_of_each_source() -> None:
    prep = Prep(smoothing=1.0, source_weights={"wiki/*.jsonl": 3.0, "spam": 0.0})
    tokens = pools(en=[1_000_000.0, 3_000_000.0, 0.0], sw=[0.0, 0.0, 500_000.0])
    _, *lines = mix_table(tokens, prep, pools(en=[9e10, 16e10, 0.0], sw=[0.0, 0.0, 0.0])).split(
        "\n"
    )
    assert [line.split() for line in lines] == [
        ["en", "4,000,000", "±12%", "88.9%", "4,000,000", "100.0%", "1.00"],
        ["wiki/*.jsonl", "1,000,000", "±30%", "22.2%", "2,000,000", "50.0%", "2.00"],
        ["other", "files", "3,000,000", "±13%", "66.7%", "2,000,000", "50.0%", "0.67"],
        ["sw", "500,000", "±0%", "11.1%", "0", "0.0%", "0.00"],
        ["spam", "500,000", "±0%", "11.1%", "0", "0.0%", "0.00"],
    ]
