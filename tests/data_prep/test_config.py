from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data_prep.command import ConfigError
from data_prep.config import Prep, PrepRecipe, check_prep, check_prep_recipe

GOOD = Prep(input=["*.txt"], output_dir="out", tokenizer="name")


def test_good_settings_pass() -> None:
    check_prep_recipe(PrepRecipe(prep=GOOD))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input": []}, r"prep\.input is empty"),
        ({"output_dir": None}, r"prep\.output_dir is null"),
        ({"output_dir": ""}, r"prep\.output_dir is null"),
        ({"seq_len": 7}, r"prep\.seq_len=7 is below 8"),
        ({"rows_per_block": 0}, r"prep\.rows_per_block=0"),
        ({"blocks_per_shard": 0}, r"prep\.blocks_per_shard=0"),
        ({"heldout_rows": -1}, r"prep\.heldout_rows=-1"),
        ({"seq_len": 1 << 20, "rows_per_block": 1 << 11}, r"prep\.rows_per_block=2048 .* int32"),
        ({"smoothing": -0.1}, r"prep\.smoothing=-0\.1"),
        ({"smoothing": 1.1}, r"prep\.smoothing=1\.1"),
        ({"smoothing": float("nan")}, r"prep\.smoothing=nan"),
        ({"max_repeats": 0.5}, r"prep\.max_repeats=0\.5 is below 1"),
        ({"max_repeats": float("nan")}, r"prep\.max_repeats=nan"),
        ({"min_chars": 0}, r"prep\.min_chars=0 is below 1"),
        ({"exclude_ngram": 4}, r"prep\.exclude_ngram=4 is below 5"),
        ({"max_repetition": 1.1}, r"prep\.max_repetition=1\.1"),
        ({"max_repetition": float("nan")}, r"prep\.max_repetition=nan"),
        ({"near_duplicates": 0.0}, r"prep\.near_duplicates=0\.0"),
        ({"near_duplicates": 1.1}, r"prep\.near_duplicates=1\.1"),
        ({"near_duplicates": float("nan")}, r"prep\.near_duplicates=nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_prep(dataclasses.replace(GOOD, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_len": 8},
        {"smoothing": 0.0},
        {"smoothing": 1.0},
        {"heldout_rows": 0},
        {"min_chars": 1},
        {"exclude_ngram": 5},
        {"max_repetition": 0.0},
        {"max_repetition": 1.0},
        {"near_duplicates": 1.0},
    ],
)
def test_the_bounds_themselves_work(changes: dict[str, Any]) -> None:
    check_prep(dataclasses.replace(GOOD, **changes))


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_prep(dataclasses.replace(GOOD, output_dir=str(tmp_path / "file")))


def test_seeds_are_keys_of_eight_bytes() -> None:
    for seed in (0, 2**64 - 1):
        check_prep_recipe(PrepRecipe(prep=GOOD, seed=seed))
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match=rf"seed={seed} is outside"):
            check_prep_recipe(PrepRecipe(prep=GOOD, seed=seed))


def test_the_tokenizer_is_the_preps_own_or_else_the_teachers() -> None:
    teacher = {"model": "teacher", "layer": 3}
    assert PrepRecipe(prep=GOOD, teacher=teacher).tokenizer == "name"
    without = dataclasses.replace(GOOD, tokenizer=None)
    assert PrepRecipe(prep=without, teacher=teacher).tokenizer == "teacher"
    with pytest.raises(ConfigError, match=r"prep\.tokenizer and teacher\.model are both null"):
        check_prep_recipe(PrepRecipe(prep=without))
