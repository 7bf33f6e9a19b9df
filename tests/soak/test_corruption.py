"""A small campaign of damage, seeded; `tests/soak/corruptions.py` makes as much as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.corruptions import (
    checkpoint_complaint,
    damage_checkpoints,
    damage_shards,
    make_checkpoints,
    make_shards,
    shard_complaint,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYON_NUM_THREADS", "1")
        return make_shards(tmp_path_factory.mktemp("whole") / "shards")


def test_damage_to_shards_is_named(shards: Path, tmp_path: Path) -> None:
    assert not list(damage_shards(shards, tmp_path, number=8, seed=1))


def test_damage_to_checkpoints_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = make_checkpoints(tmp_path / "run")
    assert not list(damage_checkpoints(whole, tmp_path, number=8, seed=1))


def test_the_campaigns_would_complain(shards: Path, tmp_path: Path) -> None:
    """Of a reader that takes damage for good, as it does where nothing is damaged."""
    assert "verify does not name" in str(shard_complaint(shards, shards, ["train-000000.tar"]))
    whole = make_checkpoints(tmp_path / "run")
    complaint = checkpoint_complaint(whole, whole, "step-00000002", ["model.pt"])
    assert "although ['model.pt'] are damaged" in str(complaint)
