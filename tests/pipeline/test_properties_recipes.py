"""Recipes: what preparation and training agree on, secrets, and mutations of valid ones."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.command import ConfigError, masked, parse_recipe
from data_prep.config import PrepRecipe, check_prep_recipe
from pipeline.config import ROOT, Recipe, flatten, load_recipe, load_recipes, plain, public

CONTENTS = [
    content
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if "stages" not in (content := yaml.safe_load(path.read_text()))
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 600),
    st.sampled_from([-(2**70), 2**31, 2**63, 10**18, 2**70]),
    st.floats(),
    st.sampled_from(
        ["", "auto", "minilm", "float32", "1e3", "en", "~", "null", "a: b", "[", "é\n"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["qq", "model", "name", "en", "x"]), SCALARS, max_size=2),
)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(data=st.data())
def test_a_mutated_recipe_is_read_as_it_stands_or_refused_by_its_key(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = copy.deepcopy(data.draw(st.sampled_from(CONTENTS)))
    sections = ["", *(name for name, value in content.items() if isinstance(value, dict))]
    section = data.draw(st.sampled_from(sections))
    target = content[section] if section else content
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    known = [*fields] if not section else [*target, "layer", "init", "seq_len", "save_every"]
    key = data.draw(st.one_of(st.sampled_from(known), st.text("abc_.é", min_size=1, max_size=6)))
    if data.draw(st.booleans()) or key not in target:
        target[key] = data.draw(VALUES)
    else:
        del target[key]
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    refusal = ""
    try:
        recipe, _ = load_recipe(["--config", str(path)])
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert key.partition(".")[0] in refusal or section in refusal
        return
    stated, read = flatten(content), flatten(plain(recipe))
    for name, value in stated.items():
        assert name in read or value in (None, {}), name
        if name in read:
            if isinstance(value, str) and read[name] != value:
                value = yaml.safe_load(value)  # '5' may be a number, and '~' null
            assert read[name] == value or (value is None and not read[name]), name
            if not isinstance(value, int | float):
                assert type(read[name]) is type(value) or value is None, name
    text = yaml.safe_dump(plain(recipe))
    path.write_text(text, encoding="utf-8")
    assert load_recipe(["--config", str(path)])[0] == recipe


def test_preparation_reads_every_training_recipe(tmp_path: Path) -> None:
    """As data.prepare hands it over: with all keys of all sections."""
    for content in CONTENTS:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        recipe, _ = load_recipe(["--config", str(tmp_path / "recipe.yaml")])
        (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain(recipe)))
        arguments = ["--config", str(tmp_path / "plain.yaml")]
        prepared, _ = parse_recipe(PrepRecipe, arguments, prog="p", description="d")
        check_prep_recipe(prepared)
        assert (prepared.prep, prepared.seed) == (recipe.prep, recipe.seed)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--train.warmup_steps=201"], True),  # the demo has 200 steps
        (["--train.warmup_steps=200"], False),
        (["--train.max_steps=5"], False),  # its 20 steps of warm-up are cut short
        (["--train.max_steps=5", "--train.warmup_steps=6"], True),
        (["--students=[{name: a, set: {train.warmup_steps: 201}}]"], True),
    ],
    ids=str,
)
def test_a_warm_up_that_outlasts_the_run(arguments: list[str], refused: bool) -> None:
    if not refused:
        load_recipes(arguments)
        return
    with pytest.raises(ConfigError, match=r"train\.warmup_steps=\d+ is more than train\.max_steps"):
        load_recipes(arguments)


# Secrets

SECRETS = [
    ("s3://user:pass-word@bucket/x", "s3://***@bucket/x"),
    ("https://token123@host/x.jsonl", "https://***@host/x.jsonl"),
    (
        "https://host/x.jsonl?X-Amz-Signature=abc&b=c more",
        "https://host/x.jsonl?*** more",
    ),
    ("['https://h/a?t=1', 'https://h/b']", "['https://h/a?***', 'https://h/b']"),
    ("abfs://container@account/x", "abfs://container@account/x"),
    ("datasets://owner/name?split=train", "datasets://owner/name?split=train"),
    ("s3://bucket/part-??.jsonl", "s3://bucket/part-??.jsonl"),
    ("mail a@b.org, 5 x 3: why? because", "mail a@b.org, 5 x 3: why? because"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS, ids=str)
def test_secrets_of_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MY_PASSWORD", "short")
    assert masked("401 for hf_abcdefgh, wJalrXUtnFEMI, short") == "401 for ***, ***, short"


def test_what_a_run_says_of_its_recipe_has_no_secrets(make_any: Callable[..., Recipe]) -> None:
    url = "https://me:hush@host/shards?sig=hush"
    recipe = make_any("--data.shards", url, f"--prep.input=['{url}']")
    assert recipe.data.shards == url
    assert "hush" not in json.dumps(public(recipe))
    assert public(make_any()) == plain(make_any())


@pytest.fixture
def make_any() -> Callable[..., Recipe]:
    return lambda *arguments: load_recipe(arguments)[0]
