"""What a DeepSpeed JSON may say, and what the recipe makes of it. Needs nothing of DeepSpeed.

So a mistake is refused before a library is loaded. tests/pipeline/unit/test_properties_ds_config.py
holds the rules against DeepSpeed's own.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_prep.command import ConfigError
from pipeline.config import Recipe, flatten

Rule = Callable[[Any], str | None]  # what is wrong with a value; None where nothing is


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


def _number(value: Any, least: float, most: float) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    good = is_number and least <= value <= most
    return None if good else f"is not a number from {least:g} to {most:g}"


def _count(least: int, most: int = 2**63 - 1) -> Rule:
    def rule(value: Any) -> str | None:
        if isinstance(value, int | float) and value == value // 1:  # 5e8 is how JSON writes it
            return _number(value, least, most)
        return f"is not a whole number from {least} on"

    return rule


def _dtype(value: Any) -> str | None:
    return None if value in ("fp32", "fp16", "bf16") else "is not fp32, fp16 or bf16"


def _offload(value: Any) -> str | None:
    good = value is None or (isinstance(value, dict) and value.get("device") in ("none", "cpu"))
    return None if good else 'is not an object whose "device" is "none" or "cpu"'


def _any(value: Any) -> str | None:
    return None


# All that is passed on to DeepSpeed, which ignores some unknown keys silently and meets some wrong
# values hours later. What is not here has not been run with this engine, or changes its arithmetic.
SECTIONS: dict[str, dict[str, Rule]] = {
    "zero_optimization": {
        "stage": _any,  # has a rule of its own
        "contiguous_gradients": _flag,
        "reduce_scatter": _flag,
        "reduce_bucket_size": _count(1),
        "use_multi_rank_bucket_allreduce": _flag,
        "allgather_partitions": _flag,
        "allgather_bucket_size": _count(1),
        "overlap_comm": _flag,
        "round_robin_gradients": _flag,
        "ignore_unused_parameters": _flag,
        "offload_param": _offload,
        "offload_optimizer": _offload,
        "sub_group_size": _count(1),
        "stage3_prefetch_bucket_size": _count(0),
        "stage3_param_persistence_threshold": _count(0),
        "stage3_model_persistence_threshold": _count(0),
        "stage3_max_live_parameters": _count(0),
        "stage3_max_reuse_distance": _count(0),
        "stage3_gather_16bit_weights_on_model_save": _flag,
    },
    "bf16": {"enabled": _flag, "check_grad_overflow": _flag},
    "fp16": {
        "enabled": _flag,
        "loss_scale": lambda value: _number(value, 0, 2**32),
        "initial_scale_power": _count(0, 32),
        "loss_scale_window": _count(1),
        "hysteresis": _count(1),
        "consecutive_hysteresis": _flag,
        "min_loss_scale": _count(1, 2**32),
    },
    "data_types": {"grad_accum_dtype": _dtype},
    "comms_logger": dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), _flag),
    "flops_profiler": {
        "enabled": _flag,
        "profile_step": _count(1),
        "module_depth": _count(-1),
        "top_modules": _count(1),
        "detailed": _flag,
    },
}
SCALARS: dict[str, Rule] = {
    "communication_data_type": _dtype,
    "prescale_gradients": _flag,
    "gradient_predivide_factor": lambda value: _number(value, 2**-32, 2**32),
    "wall_clock_breakdown": _flag,
    "memory_breakdown": _flag,
    "dump_state": _flag,
    "steps_per_print": _count(1),
    "zero_allow_untested_optimizer": _flag,
    "zero_force_ds_cpu_optimizer": _flag,
}
DECIDED = frozenset(  # by the recipe
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "gradient_clipping optimizer seed".split()
)


def merge_ds_config(policy: Mapping[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the policy file with every "auto" replaced by the recipe's value.

    The optimizer block is checked and left out: AdamW is built here, with the recipe's values, so
    that biases and layer norms do not decay.

    Raises:
        ConfigError: a key that is unknown (DeepSpeed would ignore it), a literal that contradicts
            the recipe, or a combination that trains wrongly.
    """
    config = copy.deepcopy(dict(policy))
    _check_known("", config.keys(), [*SECTIONS, *SCALARS, *DECIDED])
    for section in ("optimizer", *SECTIONS):
        if not isinstance(config.get(section, {}), dict):
            raise ConfigError(
                f"ds_config {section}={config[section]!r} is not a JSON object; write one, or "
                "remove it"
            )
    train = recipe.train
    _check_optimizer(config.pop("optimizer", {}), recipe)
    decided = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": (
            "train.batch_size / (train.micro_batch_size x ranks)",
            recipe.accumulation_steps(world_size),
        ),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    for key, (recipe_key, value) in decided.items():
        _check_literal(key, config.get(key, "auto"), recipe_key, value)
        config[key] = value
    if "seed" in config:
        _check_literal("seed", config["seed"], "seed", recipe.seed)
    _check_precision_and_stage(config)
    _check_values(config)
    _check_offload(config)
    if train.compile and config["zero_optimization"]["stage"] == 3:
        raise ConfigError(
            "train.compile=true and ZeRO stage 3 do not go together (its hooks fetch weights "
            "inside the layers that would be compiled); use stage 1 or 2"
        )
    if leftover := sorted(k for k, v in flatten(config).items() if v == "auto"):
        raise ConfigError(
            f'ds_config {leftover[0]}="auto" is not decided by the recipe; give it a value or '
            "remove it for DeepSpeed's default"
        )
    return config


def _check_known(section: str, keys: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a key that is not passed on, and name the nearest that is."""
    if unknown := sorted(set(keys) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"use {', '.join(sorted(known))}"
        raise ConfigError(
            f"ds_config key {section + unknown[0]!r} is not one this project passes on (DeepSpeed "
            f"ignores unknown keys silently); remove it; {remedy}"
        )


def _check_values(config: Mapping[str, Any]) -> None:
    """Refuse what a key of SECTIONS or SCALARS cannot be; "auto" is for the caller to decide."""
    named = {key: (config[key], rule) for key, rule in SCALARS.items() if key in config}
    for section, rules in SECTIONS.items():
        values = config.get(section, {})
        _check_known(f"{section}.", values, list(rules))
        named |= {f"{section}.{key}": (value, rules[key]) for key, value in values.items()}
    for key, (value, rule) in named.items():
        if value != "auto" and (fault := rule(value)):
            raise ConfigError(
                f"ds_config {key}={value!r} {fault}, which is what DeepSpeed takes there; correct "
                "it, or remove it for DeepSpeed's default"
            )


def _check_literal(key: str, literal: Any, recipe_key: str, value: Any) -> None:
    same = literal == value and not isinstance(literal, bool)
    if literal != "auto" and not same:
        raise ConfigError(
            f"ds_config {key}={literal} contradicts {recipe_key}={value} of the recipe; write "
            f'"auto" there, or change the recipe'
        )


def _check_optimizer(optimizer: dict[str, Any], recipe: Recipe) -> None:
    if unknown := sorted(optimizer.keys() - {"type", "params"}):
        raise ConfigError(
            f"ds_config optimizer.{unknown[0]} is not used (type and params are); remove it"
        )
    kind, params = optimizer.get("type", "AdamW"), optimizer.get("params", {})
    if str(kind).lower() != "adamw":
        raise ConfigError(
            f"ds_config optimizer.type={kind!r} is not AdamW, which this project trains with; "
            "write AdamW or remove the block"
        )
    if not isinstance(params, dict):
        raise ConfigError(f"ds_config optimizer.params={params!r} is not a JSON object")
    decided = {
        "lr": ("train.learning_rate", recipe.train.learning_rate),
        "betas": ("train.adam_betas", list(recipe.train.adam_betas)),
        "eps": ("train.adam_eps", recipe.train.adam_eps),
        "weight_decay": ("train.weight_decay", recipe.train.weight_decay),
    }
    if unknown := sorted(params.keys() - decided.keys() - {"torch_adam", "adam_w_mode"}):
        raise ConfigError(
            f"ds_config optimizer.params.{unknown[0]} is not used; remove it (known: "
            f"{', '.join(decided)})"
        )
    if params.get("adam_w_mode", True) is not True:
        raise ConfigError(
            f"ds_config optimizer.params.adam_w_mode={params['adam_w_mode']!r} asks for Adam with "
            "weight decay in the gradient, and this project trains with AdamW; remove it"
        )
    for key, (recipe_key, value) in decided.items():
        _check_literal(f"optimizer.params.{key}", params.get(key, "auto"), recipe_key, value)


def _check_precision_and_stage(config: dict[str, Any]) -> None:
    enabled = [p for p in ("bf16", "fp16") if config.get(p, {}).get("enabled", False)]
    if len(enabled) == 2:
        raise ConfigError(
            "ds_config bf16.enabled and fp16.enabled are both true, and a student has one "
            "precision: drop one"
        )
    if not config.get("bf16", {}).get("check_grad_overflow", True):
        raise ConfigError(
            "ds_config bf16.check_grad_overflow=false lets a non-finite gradient into the weights; "
            "remove it"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ConfigError(
            f"ds_config zero_optimization.stage={stage} is not 1, 2 or 3 (stage 0 with bf16 takes "
            "wrong first Adam steps in DeepSpeed 0.19.8); use 1, which does the same arithmetic"
        )


def _check_offload(config: Mapping[str, Any]) -> None:
    zero = config["zero_optimization"]
    offloaded = {
        part for part in ("param", "optimizer")
        if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
    }  # fmt: skip
    if "param" in offloaded and zero["stage"] != 3:
        raise ConfigError(
            f"ds_config zero_optimization.offload_param needs zero_optimization.stage=3, not "
            f"{zero['stage']}, which keeps weights whole; remove it, or use stage 3"
        )
    if "optimizer" in offloaded and config.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            "ds_config zero_optimization.offload_optimizer asks for DeepSpeed's own AdamW, and "
            "this project trains with torch's; remove it, or write "
            '"zero_force_ds_cpu_optimizer": false'
        )
