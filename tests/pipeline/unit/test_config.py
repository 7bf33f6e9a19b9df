from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.command import ConfigError
from pipeline.config import (
    DEFAULT_DS_CONFIG,
    DEFAULT_RECIPE,
    ROOT,
    Recipe,
    Train,
    check_layer,
    check_world,
    divisors,
    flatten,
    load_recipe,
    plain,
    read_ds_config,
)

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CHAINS = [path for path in RECIPES if "stages:" in path.read_text()]
MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "teacher": {"model": "teacher"},
    "train": {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[Any], str]:
    """Writes YAML (or, for a string or bytes, just that); returns its path."""

    def write(content: Any) -> str:
        path = tmp_path / "recipe.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


# What is refused: the override, and what the message must hold (the key, the rule, the remedy).
BAD_OVERRIDES = [
    ("--train.max_step=3", ["'train.max_step'", "unknown", "'train.max_steps'"]),
    ("--trian.max_steps=3", ["'trian.max_steps'", "unknown", "'train.max_steps'"]),
    ("--objective.heads=3", ["'objective.heads'", "unknown"]),
    ("stray", ["stray"]),
    # Types
    ("--train.max_steps=ten", ["train.max_steps", "expected int", "ten"]),
    ("--train.max_steps=1.5", ["train.max_steps", "expected int", "1.5"]),
    ("--train.max_steps=true", ["train.max_steps", "expected int", "True"]),
    ("--train.max_steps=null", ["train.max_steps", "expected int", "None"]),
    ("--train.save_every=1e3", ["train.save_every", "expected int", "1000.0"]),
    ("--train.learning_rate=fast", ["train.learning_rate", "expected float", "fast"]),
    ("--train.learning_rate=nan", ["train.learning_rate", "nan"]),
    ("--train.adam_betas=0.9", ["train.adam_betas", "0.9"]),
    ("--train.adam_betas=[0.9]", ["train.adam_betas", "2 elements"]),
    ("--train.adam_betas=[0.9,0.99,0.999]", ["train.adam_betas", "2 elements"]),
    ("--data.row_log=maybe", ["data.row_log", "expected bool", "maybe"]),
    ("--teacher.layer=first", ["teacher.layer", "int", "first"]),
    ("--teacher.dtype=float64", ["teacher.dtype", "float64", "bfloat16", "float16", "float32"]),
    ("--objective.name=kd", ["objective.name", "kd", "minilmv2"]),
    ("--objective.relation_kl=fast", ["objective.relation_kl", "fast", "chunked", "reference"]),
    ("--objective.relations={qq: one}", ["objective.relations", "float", "one"]),
    # At least one
    ("--train.max_steps=0", ["train.max_steps=0", "below 1", "use 1 or more"]),
    ("--train.batch_size=0", ["train.batch_size=0", "use 1 or more"]),
    ("--train.batch_size=-16", ["train.batch_size=-16", "use 1 or more"]),
    ("--train.micro_batch_size=0", ["train.micro_batch_size=0", "use 1 or more"]),
    ("--train.save_every=0", ["train.save_every=0", "use 1 or more"]),
    ("--train.keep_checkpoints=0", ["train.keep_checkpoints=0", "use 1 or more"]),
    ("--train.log_every=0", ["train.log_every=0", "use 1 or more"]),
    ("--student.num_hidden_layers=0", ["student.num_hidden_layers=0", "use 1 or more"]),
    ("--student.hidden_size=0", ["student.hidden_size=0", "use 1 or more"]),
    ("--student.num_attention_heads=0", ["student.num_attention_heads=0", "use 1 or more"]),
    ("--student.intermediate_size=0", ["student.intermediate_size=0", "use 1 or more"]),
    ("--objective.num_relation_heads=0", ["objective.num_relation_heads=0", "use 1 or more"]),
    # Not negative
    ("--watch.hang_seconds=4", ["watch.hang_seconds=4", "5 <= x <= 1500", "null"]),
    ("--watch.hang_seconds=1501", ["watch.hang_seconds=1501", "5 <= x <= 1500", "null"]),
    ("--watch.on_loss_spike=drop", ["watch.on_loss_spike", "drop"]),
    ("--watch.loss_spike_window=0", ["watch.loss_spike_window=0", "use 1 or more"]),
    ("--watch.loss_spike_mads=0", ["watch.loss_spike_mads=0", "use one above 0"]),
    ("--watch.straggler_percent=0", ["watch.straggler_percent=0", "use one above 0"]),
    ("--watch.check_corruption_every=0", ["watch.check_corruption_every=0", "or null"]),
    ("--train.warmup_steps=-1", ["train.warmup_steps=-1", "use 0 or more"]),
    ("--train.eval_every=-1", ["train.eval_every=-1", "use 0 or more"]),
    ("--train.weight_decay=-0.1", ["train.weight_decay=-0.1", "use 0 or more"]),
    ("--train.weight_decay=.inf", ["train.weight_decay=inf", "use 0 or more"]),
    ("--train.weight_decay=.nan", ["train.weight_decay=nan", "use 0 or more"]),
    ("--seed=-1", ["seed=-1", "use 0 or more"]),
    # Positive and finite
    ("--train.learning_rate=0", ["train.learning_rate=0", "above 0"]),
    ("--train.learning_rate=-0.001", ["train.learning_rate=-0.001", "above 0"]),
    ("--train.learning_rate=.inf", ["train.learning_rate=inf", "above 0"]),
    ("--train.learning_rate=.nan", ["train.learning_rate=nan", "above 0"]),
    ("--train.max_grad_norm=0", ["train.max_grad_norm=0", "above 0"]),
    ("--data.cache_gb=0", ["data.cache_gb=0", "above 0"]),
    ("--data.verify=sometimes", ["data.verify", "sometimes", "first_read"]),
    ("--train.adam_eps=0", ["train.adam_eps=0", "above 0"]),
    # Shares
    ("--train.adam_betas=[0.9,1.0]", ["train.adam_betas[1]=1.0", "0 <= x < 1"]),
    ("--train.adam_betas=[-0.1,0.9]", ["train.adam_betas[0]=-0.1", "0 <= x < 1"]),
    ("--student.hidden_dropout_prob=1", ["student.hidden_dropout_prob=1.0", "0 <= x < 1"]),
    (
        "--student.attention_probs_dropout_prob=.nan",
        ["student.attention_probs_dropout_prob=nan", "0 <= x < 1"],
    ),
    # Relations
    ("--objective.relations={qx: 1}", ["objective.relations", "'qx'", "qk, qv, kq", "vv, hh"]),
    ("--objective.relations={at: 1}", ["objective.relations", "'at'", "minilmv2"]),
    ("--objective.relations={qq: -1}", ["objective.relations", "-1.0", "{qq: 1, kk: 1, vv: 1}"]),
    ("--objective.relations={qq: 0}", ["objective.relations", "nothing to imitate"]),
    ("--objective.relations={}", ["objective.relations", "nothing to imitate"]),
    ("--objective.relations={qq: .nan}", ["objective.relations", "nan"]),
    ("--objective.relations={qq: .inf}", ["objective.relations", "inf"]),
    ("--objective.temperature=0", ["objective.temperature=0", "above 0"]),
    ("--objective.mlm_probability=0", ["objective.mlm_probability=0", "above 0"]),
    ("--objective.mlm_probability=1", ["objective.mlm_probability=1.0", "0 <= x < 1"]),
    # Between keys
    (
        "--student.num_attention_heads=5",
        [
            "student.num_attention_heads=5",
            "student.hidden_size=128",
            "[1, 2, 4, 8, 16, 32, 64, 128]",
        ],
    ),
    (
        "--train.micro_batch_size=3",
        ["train.micro_batch_size=3", "train.batch_size=16", "[1, 2, 4, 8, 16]"],
    ),
    ("--train.micro_batch_size=32", ["train.micro_batch_size=32", "train.batch_size=16"]),
    ("--output_dir=", ["output_dir", "folder"]),
]


@pytest.mark.parametrize(("override", "named"), BAD_OVERRIDES, ids=lambda value: str(value)[:40])
def test_a_bad_override_is_refused_by_key_rule_and_remedy(override: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([override])
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "override", "named"),
    [
        ("minilm", "relations={qk: 1}", ["objective.relations", "'qk'", "minilm;", "at, vr, hh"]),
        ("minilm", "relations={at: 0}", ["objective.relations", "{at: 1, vr: 1}"]),
        ("distilbert", "losses={qq: 1}", ["objective.losses", "'qq'", "ce, mlm, cos"]),
        ("distilbert", "losses={ce: -1}", ["objective.losses", "{ce: 5, mlm: 2, cos: 1}"]),
        ("distilbert", "losses={cos: 1, ce: 0}", ["objective.losses", "ce or mlm"]),
    ],
)
def test_the_terms_of_another_objective_are_refused(
    name: str, override: str, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([f"--objective.name={name}", f"--objective.{override}"])
    assert all(part in str(caught.value) for part in named), str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        ([], {"kk": 1, "qq": 1, "vv": 1}),
        (["--objective.relations={vq: 2, kk: 0, hh: 0.5}"], {"hh": 0.5, "vq": 2}),
        (["--objective.name=minilm"], {"at": 1, "vr": 1}),
        (
            ["--objective.name=minilm", "--objective.relations={vr: 1, hh: 1, at: 2}"],
            {"at": 2, "hh": 1, "vr": 1},
        ),
        (["--objective.name=distilbert"], {"ce": 5, "cos": 1, "mlm": 2}),
        (
            ["--objective.name=distilbert", "--objective.losses.cos=0"],
            {"ce": 5, "mlm": 2},
        ),
    ],
)
def test_the_weights_are_the_papers_or_the_recipes(
    overrides: list[str], weights: dict[str, float]
) -> None:
    recipe, _ = load_recipe(overrides)
    assert list(recipe.objective.weights.items()) == list(weights.items())


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (("output_dir",), "output_dir"),
        (("teacher", "model"), "teacher.model"),
        (("train", "max_steps"), "train.max_steps"),
        (("train", "batch_size"), "train.batch_size"),
        (("train", "micro_batch_size"), "train.micro_batch_size"),
    ],
)
def test_a_missing_key_is_refused_by_name(
    missing: tuple[str, ...], named: str, write_recipe: Callable[[Any], str]
) -> None:
    recipe = json.loads(json.dumps(MINIMAL))
    section = recipe
    for key in missing[:-1]:
        section = section[key]
    del section[missing[-1]]
    with pytest.raises(ConfigError, match=rf"required.*{named}"):
        load_recipe(["--config", write_recipe(recipe)])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {**MINIMAL["train"], "lr": 1e-3}}, "'train.lr'"),
        ({"teachers": {"model": "x"}}, "'teachers"),
        ({"sead": 3}, "'sead'"),
        ({"teacher": "just-a-name"}, "teacher"),
        ({"train": None}, "train"),
    ],
    ids=str,
)
def test_a_recipe_with_a_wrong_key_or_section_is_refused_by_name(
    changes: dict[str, Any], named: str, write_recipe: Callable[[Any], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(["--config", write_recipe({**MINIMAL, **changes})])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "just text", "- a\n- list", "output_dir: [", b"\xff\xfe\x00"], ids=repr
)
def test_a_file_that_is_no_recipe_is_refused_by_its_name(
    content: str | bytes, write_recipe: Callable[[Any], str]
) -> None:
    path = write_recipe(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(["--config", path])
    assert path in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"/no/such\.yaml"):
        load_recipe(["--config", "/no/such.yaml"])


@pytest.mark.parametrize("path", sorted({*RECIPES} - {*CHAINS}), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    recipe, _ = load_recipe(["--config", str(path)])
    content = yaml.safe_load(path.read_text())
    assert flatten(plain(recipe)).items() >= flatten(json.loads(json.dumps(content))).items()


def test_there_are_recipes() -> None:
    assert DEFAULT_RECIPE in RECIPES


def test_defaults_without_any_argument() -> None:
    recipe, options = load_recipe([])
    assert recipe == load_recipe(["--config", str(DEFAULT_RECIPE)])[0]
    assert options.deepspeed == str(DEFAULT_DS_CONFIG)
    assert options.allow_change == []
    assert DEFAULT_DS_CONFIG.is_file()


def test_any_key_is_overridden_by_its_dotted_name(write_recipe: Callable[[Any], str]) -> None:
    recipe, options = load_recipe(
        [
            *("--config", write_recipe(MINIMAL)),
            *("--deepspeed", "ds_configs/zero3.json"),
            *("--output_dir", "runs/y", "--seed", "7", "--teacher.layer", "3"),
            *("--student.hidden_size=96", "--train.adam_betas=[0.8, 0.95]"),
            *("--train.learning_rate", "1e-4", "--objective.relations.qq=0.5"),
            *("--data.row_log=true", "--prep.input=['a/*.txt']", "--local_rank=1"),
        ]
    )
    assert options.deepspeed == "ds_configs/zero3.json"
    assert (recipe.output_dir, recipe.seed, recipe.teacher.layer) == ("runs/y", 7, 3)
    assert (recipe.student.hidden_size, recipe.train.adam_betas) == (96, (0.8, 0.95))
    assert recipe.train.learning_rate == 1e-4
    assert recipe.objective.relations == {"qq": 0.5, "kk": 1.0, "vv": 1.0}
    assert recipe.data.row_log is True
    assert recipe.prep.input == ["a/*.txt"]
    assert recipe.train.max_steps == 3  # the file's, where nothing overrides it


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["--allow_change", "train.max_steps"], ["train.max_steps"]),
        (["--allow_change=train.max_steps"], ["train.max_steps"]),
        (["--allow_change", "seed", "--allow_change", "train"], ["seed", "train"]),
    ],
    ids=str,
)
def test_allow_change_takes_a_key_or_several(arguments: list[str], keys: list[str]) -> None:
    assert load_recipe(arguments)[1].allow_change == keys


def test_a_single_relation_replaces_the_defaults(write_recipe: Callable[[Any], str]) -> None:
    content = {**MINIMAL, "objective": {"relations": {"vv": 2}}}
    recipe, _ = load_recipe(["--config", write_recipe(content)])
    assert recipe.objective.relations == {"vv": 2.0}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--output_dir=007", "--data.shards=null", "--teacher.model=on"],
        ["--train.learning_rate=3.0000000000000004e-05", "--train.adam_eps=1e-08"],
        ["--train.adam_betas=[0.9, 0.98]", "--objective.relations={vv: 0.1}"],
        ["--objective.name=minilm"],
        ["--objective.name=distilbert", "--objective.losses={mlm: 1, ce: 0.5}"],
        ["--teacher.layer=2", "--student.model=some/model", "--prep.input=['a: b', '*.txt']"],
    ],
    ids=str,
)
def test_a_runs_config_yaml_is_the_same_recipe(
    overrides: list[str], write_recipe: Callable[[Any], str]
) -> None:
    recipe, _ = load_recipe(overrides)
    dumped = write_recipe(yaml.safe_dump(plain(recipe), sort_keys=False))
    assert load_recipe(["--config", dumped])[0] == recipe


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_help_and_print_config_end_well(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as request:
        load_recipe([option])
    assert request.value.code == 0
    printed = capsys.readouterr().out
    assert "micro_batch_size" in printed
    if option == "--print_config":
        assert yaml.safe_load(printed)["train"]["max_steps"] == 200


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_recipe(["--help"])
    text = capsys.readouterr().out
    recipe, _ = load_recipe([])
    weights = ("objective.relations.", "objective.losses.")
    for key in {name for name in flatten(recipe) if not name.startswith(weights)}:
        entry = re.search(rf"\n  --{re.escape(key)} .*?\((required|type)", text, re.DOTALL)
        assert entry, key
        assert re.search(r"\s[a-z]+", entry[0]), key  # words of ours, before the parser's


# Rules that need the number of ranks, or the models


@pytest.mark.parametrize(
    ("batch", "micro", "world", "fits"),
    [(16, 2, 8, True), (16, 2, 4, True), (16, 16, 1, True), (16, 2, 3, False), (16, 16, 2, False)],
)
def test_ranks_share_a_batch_evenly_or_are_refused(
    batch: int, micro: int, world: int, fits: bool, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(train={"batch_size": batch, "micro_batch_size": micro})
    if fits:
        check_world(recipe, world)
        assert recipe.accumulation_steps(world) * micro * world == batch
    else:
        with pytest.raises(ConfigError) as caught:
            check_world(recipe, world)
        for named in (f"train.batch_size={batch}", f"{micro} x {world} ranks = {micro * world}"):
            assert named in str(caught.value)
        assert f"use a multiple of {micro * world}" in str(caught.value)


@pytest.mark.parametrize("layer", [None, 1, 24])
def test_a_layer_that_the_teacher_has(
    layer: int | None, make_recipe: Callable[..., Recipe]
) -> None:
    check_layer(make_recipe(teacher={"layer": layer}), teacher_layers=24)


@pytest.mark.parametrize("layer", [0, -1, 25])
def test_a_layer_that_the_teacher_lacks(layer: int, make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(teacher={"layer": layer})
    with pytest.raises(ConfigError, match=rf"teacher\.layer={layer} .*1 to 24.*null"):
        check_layer(recipe, teacher_layers=24)


def test_the_place_of_the_shards(make_recipe: Callable[..., Recipe]) -> None:
    assert make_recipe(data={"shards": "a"}).shards == "a"
    recipe = make_recipe(data={"shards": None})
    with pytest.raises(ConfigError, match=r"data\.shards.*prep\.output_dir.*set data\.shards"):
        _ = recipe.shards
    prep = dataclasses.replace(recipe.prep, output_dir="b")
    assert dataclasses.replace(recipe, prep=prep).shards == "b"


def test_the_tokenizer_is_the_teachers_unless_prep_names_one(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe(teacher={"model": "t"})
    assert recipe.tokenizer == "t"
    prep = dataclasses.replace(recipe.prep, tokenizer="p")
    assert dataclasses.replace(recipe, prep=prep).tokenizer == "p"


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(13) == [1, 13]


def test_flatten() -> None:
    nested = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}
    assert flatten(nested) == {"a": 1, "b.c": [1, 2], "b.d.e": None, "f": {}}
    train = Train(max_steps=1, batch_size=2, micro_batch_size=1)
    assert flatten({"train": train})["train.batch_size"] == 2


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=str)
def test_read_ds_config(path: Path) -> None:
    assert read_ds_config(str(path)) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("content", "rule"), [(None, "cannot be read"), ("{", "not JSON"), ("[]", "not a JSON object")]
)
def test_a_ds_config_that_is_none_is_refused_by_its_name(
    content: str | None, rule: str, tmp_path: Path
) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"--deepspeed {path}.*{rule}"):
        read_ds_config(str(path))


def test_a_ds_config_that_is_no_text_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=rf"--deepspeed {path}"):
        read_ds_config(str(path))
    with pytest.raises(ConfigError, match=rf"--deepspeed {tmp_path}"):
        read_ds_config(str(tmp_path))


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("output_dir: a\nseed: 1\nteacher: {model: x}\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml.*'seed' stands there twice"):
        load_recipe(["--config", str(path)])
