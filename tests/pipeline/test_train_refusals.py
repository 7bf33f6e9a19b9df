"""What cannot work is refused in one line that names it, and nothing is written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.launch import fork, run, start


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(arguments: list[str], status: int, *words: str, **how: Any) -> None:
    """The command ends with this status and one error line that holds the words."""
    outcome = run(arguments, **how)
    assert outcome.status == status, outcome.output
    assert len(outcome.errors) == 1, outcome.output
    for word in words:
        assert word in outcome.errors[0]
    assert "Traceback" not in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "override", "words"),
    [
        (start, "--train.max_step=5", ["train.max_step", "train.max_steps"]),
        (fork, "--teacher.model=/no/such/folder", ["teacher.model", "/no/such/folder"]),
        # Whether the hub is asked is decided before its client is loaded, as it is in forks.
        (start, "--teacher.model=models/no-such", ["teacher.model", "models/no-such"]),
        (
            fork,
            "--objective.num_relation_heads=7",
            ["objective.num_relation_heads=7", "1, 2, 3, 4"],
        ),
        (fork, "--train.batch_size=9", ["train.batch_size=9", "train.micro_batch_size"]),
        (fork, "--teacher.layer=5", ["teacher.layer=5", "layers 1 to 4"]),
        (start, "--data.shards=/no/such/shards", ["data.shards", "/no/such/shards"]),
        (fork, "--train.max_steps=many", ["train.max_steps", "many"]),
    ],
)
def test_bad_recipes(
    begin: type, override: str, words: list[str], tiny: list[str], tmp_path: Path
) -> None:
    refused([*tiny, override], 2, *words, ranks=2, begin=begin)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_batch_that_ranks_cannot_share(tiny: list[str]) -> None:
    arguments = [*tiny, "--train.micro_batch_size=8"]
    refused(arguments, 2, "train.batch_size=8", "2 ranks", ranks=2, begin=fork)


@pytest.mark.slow
def test_shards_of_another_tokenizer(tiny: list[str], bert_shards: Path) -> None:
    arguments = [*tiny, f"--data.shards={bert_shards}"]
    refused(arguments, 2, "another tokenizer", str(bert_shards), begin=fork)


@pytest.mark.slow
def test_a_ds_config_that_contradicts_the_recipe(tiny: list[str], tmp_path: Path) -> None:
    policy = tmp_path / "ds.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 99}))
    refused(tiny, 2, "train_batch_size=99", "train.batch_size=8", stage=str(policy), begin=fork)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "damage"), [(fork, "manifest"), (fork, "truncated"), (start, "flipped")]
)
def test_damaged_shards(
    begin: type, damage: str, tiny: list[str], heldout_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(heldout_shards, shards)
    victim = shards / ("manifest.json" if damage == "manifest" else "train-000000.tar")
    raw = bytearray(victim.read_bytes())
    if damage == "truncated":
        del raw[-1000:]
    else:
        raw[len(raw) // 3] ^= 4
    victim.write_bytes(raw)
    before = snapshot(shards)
    refused([*tiny, f"--data.shards={shards}"], 1, victim.name, ranks=2, begin=begin)
    assert snapshot(shards) == before
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_a_teacher_that_is_not_finite(
    tiny: list[str], xlmr: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(xlmr[0], teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = float("inf")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    refused([*tiny, f"--teacher.model={teacher}"], 1, "step 1, rank 0", "rows [", ranks=2)
    assert not (tmp_path / "run" / "checkpoints").exists()
