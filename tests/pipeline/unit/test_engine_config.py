from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.command import ConfigError, RunError
from pipeline import engine
from pipeline.config import ROOT, Recipe, flatten
from pipeline.engine import merge_ds_config, read_weights

DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
POLICY: dict[str, Any] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        train={
            "batch_size": 16,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "adam_betas": (0.9, 0.98),
            "adam_eps": 1e-6,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        }
    )


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_ds_config_of_the_repository_merges(
    path: Path, world_size: int, recipe: Recipe
) -> None:
    policy = json.loads(path.read_text())
    before = copy.deepcopy(policy)
    merged = merge_ds_config(policy, recipe, world_size)
    assert policy == before
    assert merged["train_batch_size"] == 16
    assert merged["train_micro_batch_size_per_gpu"] == 2
    assert merged["gradient_accumulation_steps"] == 8 // world_size
    assert merged["gradient_clipping"] == 0.5
    assert "auto" not in flatten(merged).values()
    assert "optimizer" not in merged
    for section in ("zero_optimization", "bf16", "fp16", "data_types"):
        assert merged.get(section) == policy.get(section)


def test_the_ds_configs_are_the_contracts() -> None:
    facts = {}
    for path in DS_CONFIGS:
        config = json.loads(path.read_text())
        precisions = [p for p in ("bf16", "fp16") if config.get(p, {}).get("enabled")]
        facts[path.name] = (config["zero_optimization"]["stage"], precisions)
    assert (
        facts.items()
        >= {
            "zero1.json": (1, ["bf16"]),
            "zero2.json": (2, ["bf16"]),
            "zero3.json": (3, ["bf16"]),
            "zero2_fp16.json": (2, ["fp16"]),
            "zero2_fp32.json": (2, []),
        }.items()
    )


def test_what_is_left_out_is_the_recipes(recipe: Recipe) -> None:
    merged = merge_ds_config(POLICY, recipe, 2)
    assert (merged["train_batch_size"], merged["gradient_accumulation_steps"]) == (16, 4)


@pytest.mark.parametrize(
    "literals",
    [
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2},
        {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5},
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.98]}}},
        {"optimizer": {"type": "adamw", "params": {"eps": 1e-6, "weight_decay": 0.01}}},
        {"optimizer": {"params": {"betas": "auto", "torch_adam": True}}},
        {"optimizer": {}},
    ],
    ids=str,
)
def test_a_literal_that_says_the_same_as_the_recipe_is_accepted(
    literals: dict[str, Any], recipe: Recipe
) -> None:
    assert merge_ds_config({**POLICY, **literals}, recipe, 2) == merge_ds_config(POLICY, recipe, 2)


CONTRADICTIONS = [
    ({"train_batch_size": 32}, ["train_batch_size=32", "train.batch_size=16"]),
    ({"train_batch_size": None}, ["train_batch_size=None", "train.batch_size=16"]),
    (
        {"train_micro_batch_size_per_gpu": 4},
        ["train_micro_batch_size_per_gpu=4", "train.micro_batch_size=2"],
    ),
    ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps=8", "ranks", "=4"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "train.max_grad_norm=0.5"]),
    ({"gradient_clipping": [0.5]}, ["gradient_clipping=[0.5]", "train.max_grad_norm=0.5"]),
    (
        {"optimizer": {"params": {"lr": 0.1}}},
        ["optimizer.params.lr=0.1", "train.learning_rate=0.001"],
    ),
    ({"optimizer": {"params": {"lr": [0.001]}}}, ["optimizer.params.lr", "train.learning_rate"]),
    ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, ["params.betas", "train.adam_betas"]),
    ({"optimizer": {"params": {"betas": [0.9]}}}, ["params.betas", "train.adam_betas"]),
    ({"optimizer": {"params": {"betas": 0.9}}}, ["params.betas", "train.adam_betas"]),
    ({"optimizer": {"params": {"eps": 1e-8}}}, ["params.eps", "train.adam_eps"]),
    ({"optimizer": {"params": {"weight_decay": 0.1}}}, ["weight_decay=0.1", "0.01"]),
]


@pytest.mark.parametrize(("literals", "named"), CONTRADICTIONS, ids=str)
def test_a_literal_that_contradicts_the_recipe_is_refused(
    literals: dict[str, Any], named: list[str], recipe: Recipe
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_ds_config({**POLICY, **literals}, recipe, 2)
    message = str(caught.value)
    assert all(part in message for part in [*named, "contradicts", '"auto"']), message


REFUSED = [
    ({"zero_optimisation": {}}, ["zero_optimisation", "zero_optimization", "ignores"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "remove it"]),
    ({"zero_optimization": {"stage": 0}}, ["stage=0", "use 1"]),
    ({"zero_optimization": {}}, ["stage=0", "use 1"]),
    ({"zero_optimization": {"stage": 4}}, ["stage=4", "1, 2 or 3"]),
    ({"zero_optimization": {"stage": "2"}}, ["stage=2", "1, 2 or 3"]),
    ({"zero_optimization": {"stage": "auto"}}, ["stage=auto", "1, 2 or 3"]),
    ({"zero_optimization": 2}, ["zero_optimization=2", "not a JSON object"]),
    ({"bf16": True}, ["bf16=True", "not a JSON object"]),
    ({"fp16": {"enabled": True}}, ["bf16", "fp16", "drop one"]),
    ({"bf16": {"enabled": True, "check_grad_overflow": False}}, ["check_grad_overflow", "remove"]),
    ({"bf16": {"enabled": "auto"}}, ["bf16.enabled", '"auto"']),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
        ["zero_optimization.reduce_bucket_size", '"auto"', "remove it"],
    ),
    ({"seed": "auto"}, ["seed", '"auto"']),
    ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "'Lamb'", "AdamW"]),
    ({"optimizer": {"type": 5}}, ["optimizer.type", "5", "AdamW"]),
    ({"optimizer": {"type": None}}, ["optimizer.type", "None", "AdamW"]),
    ({"optimizer": {"params": {"amsgrad": True}}}, ["optimizer.params.amsgrad", "remove it"]),
    ({"optimizer": {"params": [1]}}, ["optimizer.params", "not a JSON object"]),
    ({"optimizer": "AdamW"}, ["optimizer='AdamW'", "not a JSON object"]),
    ({"optimizer": {"kind": "AdamW"}}, ["optimizer.kind"]),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=str)
def test_what_trains_wrongly_or_would_be_ignored_is_refused(
    changes: dict[str, Any], named: list[str], recipe: Recipe
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge_ds_config({**POLICY, **changes}, recipe, 2)
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_no_policy_at_all_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="stage"):
        merge_ds_config({}, recipe, 1)


# The weights in a checkpoint


@pytest.fixture
def universal(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for DeepSpeed's converter: what it would write, by parameter."""
    stored: dict[str, Any] = {
        "encoder.weight": {"param": torch.arange(6.0)},
        "encoder.bias": {"param": torch.arange(3.0)},
    }

    def convert(folder: Path, tag: str, destination: Path) -> None:
        for name, content in stored.items():
            path = destination / tag / "zero" / f"model.{name}" / "fp32.pt"
            path.parent.mkdir(parents=True)
            torch.save(content, path)

    monkeypatch.setattr(engine, "convert_to_universal", convert)
    return stored


def test_weights_are_read_by_name_and_shape(universal: dict[str, Any], tmp_path: Path) -> None:
    shapes = {"encoder.weight": torch.Size([2, 3]), "encoder.bias": torch.Size([3])}
    weights = read_weights(tmp_path, "step-00000001", shapes)
    assert weights["encoder.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["encoder.bias"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"encoder.gain": torch.Size([3])}, r"'encoder\.gain'"),
        ({"encoder.bias": torch.Size([4])}, r"'encoder\.bias' with 3 values"),
    ],
    ids=str,
)
def test_weights_of_another_student_are_refused_and_leave_nothing_behind(
    universal: dict[str, Any], shapes: dict[str, torch.Size], named: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=named):
        read_weights(tmp_path, "step-00000001", shapes)
    assert list(tmp_path.iterdir()) == []
