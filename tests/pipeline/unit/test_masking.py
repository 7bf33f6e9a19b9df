from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_prep.command import ConfigError
from pipeline.masking import Masking

SPECIAL, MASK, SIZE = (0, 1, 2, 3, 49), 49, 50
GAP = 30  # an id that no token has
N = 400_000


def make_tokenizer(mask: int | None = MASK) -> Any:
    return SimpleNamespace(
        mask_token_id=mask,
        all_special_ids=list(SPECIAL),
        get_vocab=lambda: {f"t{i}": i for i in range(SIZE) if i != GAP},
        name_or_path="there",
    )


def make_masking(probability: float = 0.15, seed: int = 1) -> Masking:
    return Masking(make_tokenizer(), probability, seed)


def random_ids(number: int = N) -> npt.NDArray[np.int64]:
    ids = np.random.default_rng(0).integers(0, SIZE, number)
    return np.where(ids == GAP, 0, ids)


def assert_share(is_so: npt.NDArray[np.bool_], share: float) -> None:
    """Within five standard deviations of what independent draws give."""
    assert abs(is_so.mean() - share) < 5 * (share * (1 - share) / len(is_so)) ** 0.5


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_ordinary_tokens_are_chosen_with_the_probability_and_special_ones_never(
    probability: float,
) -> None:
    ids = random_ids()
    shown, is_chosen = make_masking(probability)(ids, 0, "train")
    is_special = np.isin(ids, SPECIAL)
    assert_share(is_chosen[~is_special], probability)
    assert not is_chosen[is_special].any()
    assert np.array_equal(shown[~is_chosen], ids[~is_chosen])


def test_of_the_chosen_80_percent_are_masked_10_replaced_and_10_left() -> None:
    ids = random_ids()
    shown, is_chosen = make_masking()(ids, 0, "train")
    ids, shown = ids[is_chosen], shown[is_chosen]
    others = SIZE - len(SPECIAL) - 1
    assert_share(shown == MASK, 0.8)
    assert_share(shown == ids, 0.1 + 0.1 / others)  # a substitute may be what it stands for
    is_replaced = (shown != MASK) & (shown != ids)
    substitutes, counts = np.unique(shown[is_replaced], return_counts=True)
    assert set(substitutes) == set(range(SIZE)) - set(SPECIAL) - {GAP}
    assert counts.min() > 0.7 * counts.mean()


def test_tokens_are_chosen_independently_of_their_neighbours() -> None:
    ids = np.full(N, 7)
    _, is_chosen = make_masking()(ids, 0, "train")
    for distance in (1, 2, 3, 4, 512):
        assert_share(is_chosen[:-distance] & is_chosen[distance:], 0.15**2)


@pytest.mark.parametrize("first", [0, 1, 511, 2**40])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_mask_does_not_depend_on_how_tokens_are_cut_into_batches(first: int, size: int) -> None:
    ids = random_ids(1000)
    whole, is_chosen = make_masking()(ids, first, "train")
    parts = [
        make_masking()(ids[start : start + size], first + start, "train")
        for start in range(0, 1000, size)
    ]
    assert np.array_equal(np.concatenate([shown for shown, _ in parts]), whole)
    assert np.array_equal(np.concatenate([chosen for _, chosen in parts]), is_chosen)
    assert is_chosen.any()


def test_seeds_streams_and_epochs_are_masked_differently() -> None:
    ids = np.full(1000, 7)
    first = make_masking()(ids, 0, "train")[1]
    for other in (
        make_masking(seed=2)(ids, 0, "train")[1],
        make_masking()(ids, 0, "heldout/de")[1],
        make_masking()(ids, 1_000_000, "train")[1],
    ):
        assert 0 < (first & other).sum() < 0.5 * first.sum()


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'there' has no mask token.*distilbert.*minilmv2"):
        Masking(make_tokenizer(mask=None), 0.15, 1)
