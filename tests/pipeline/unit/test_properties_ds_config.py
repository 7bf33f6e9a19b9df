"""ds_configs: our rules against DeepSpeed's own, and mutations of valid ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.command import ConfigError
from pipeline.config import ROOT, Recipe, flatten
from pipeline.ds_config import SCALARS, SECTIONS, merge_ds_config

POLICIES = [json.loads(p.read_text()) for p in sorted((ROOT / "ds_configs").glob("*.json"))]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from(["auto", "fp32", "fp16", "bf16", "AdamW", "", "yes", "5", "cpu"]),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["enabled", "stage", "device", "x"]), st.booleans()),
)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """DeepSpeed's own models of the sections that we pass on."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "fp16", "comms_logger"])
def test_deepspeed_takes_what_the_rules_pass(section: str, models: dict[str, Any]) -> None:
    """Every key is one of DeepSpeed's, and what a rule passes is read as it stands there."""
    given = [True, False, 0, 1, 5, 16, 5e8, 0.5, 2**40, -1, "cpu", "yes", None, [], {}]
    fields = {field.alias or name: name for name, field in models[section].model_fields.items()}
    for key, rule in SECTIONS[section].items():
        for value in given if key != "stage" else [1, 2, 3]:
            if rule(value) is None:
                read = getattr(models[section](**{key: value}), fields[key])
                assert read == value, key
                assert isinstance(read, bool) == isinstance(value, bool), key


@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_a_mutated_ds_config_is_merged_or_refused_by_its_key(
    data: st.DataObject, make_recipe: Callable[..., Recipe]
) -> None:
    """What is accepted says what it said, apart from "auto"; what is refused is named."""
    policy = copy.deepcopy(data.draw(st.sampled_from(POLICIES)))
    known = [*SECTIONS, *SCALARS, "train_batch_size", "gradient_clipping", "seed", "optimizer"]
    section = data.draw(st.sampled_from(["", *SECTIONS, "optimizer", "optimizer.params"]))
    target = policy
    for name in section.split(".") if section else ():
        target = target.setdefault(name, {})
    names = known if not section else [*SECTIONS.get(section, {}), "type", "params", "lr", "betas"]
    key = data.draw(st.one_of(st.sampled_from(names), st.text(max_size=8)))
    target[key] = data.draw(VALUES)
    recipe = make_recipe(train={"batch_size": 16, "micro_batch_size": 2})
    refusal = ""
    try:
        merged = merge_ds_config(policy, recipe, 2)
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert key in refusal or repr(key)[1:-1] in refusal
    else:
        stated = flatten({k: v for k, v in policy.items() if k != "optimizer"})
        assert all(flatten(merged)[k] == v for k, v in stated.items() if v != "auto")
