"""Layers ranked by what their students determine, and what is refused before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.command import ConfigError
from pipeline.choose_layer import candidates, main
from pipeline.config import load_recipe
from pipeline.readout import RIDGE, check_size, explained
from tests.pipeline.launch import ROOT, environment, free_port


def random_batches(
    generator: torch.Generator, sizes: list[int], width: int
) -> list[list[torch.Tensor]]:
    return [[torch.randn(n, width, generator=generator) for n in sizes] for _ in range(2)]


def test_the_share_is_that_of_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    features = random_batches(generator, [30, 20, 25], 4)
    true_map = torch.randn(4, 3, generator=generator)
    targets = [
        [x @ true_map + torch.randn(len(x), 3, generator=generator) for x in batches]
        for batches in features
    ]
    fit_x = torch.cat([batches[i] for batches in features for i in (0, 2)]).double()
    fit_y = torch.cat([batches[i] for batches in targets for i in (0, 2)]).double()
    mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
    centred = fit_x - mean_x
    # Ridge regression as least squares with rows added, which is how its definition reads.
    strength = (RIDGE * centred.square().sum(0).mean()).sqrt()
    rows = torch.cat([centred, strength * torch.eye(4)])
    solution = torch.linalg.lstsq(rows, torch.cat([fit_y - mean_y, torch.zeros(4, 3)])).solution
    expected = []
    for of_x, of_y in zip(features, targets, strict=True):
        x, y = of_x[1].double(), of_y[1].double()
        error = y - mean_y - (x - mean_x) @ solution
        expected.append(float(1 - error.square().sum() / (y - y.mean(0)).square().sum()))
    assert explained(features, targets) == pytest.approx(expected, rel=1e-9)
    assert 0 < min(expected) < max(expected) < 1


def test_what_determines_everything_and_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    features = random_batches(generator, [400, 400], 5)
    exact = [[3 * x[:, :2] + 1 for x in batches] for batches in features]
    unrelated = random_batches(generator, [400, 400], 2)
    assert min(explained(features, exact)) > 0.999999
    assert max(explained(features, unrelated)) < 0.05


def test_one_batch_is_halved() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 3, generator=generator)
    assert explained([[x]], [[2 * x]]) == pytest.approx([1.0], abs=1e-6)


def test_too_few_rows_to_fit_on_are_refused(tiny: list[str]) -> None:
    recipe, _ = load_recipe(tiny)
    check_size(recipe, [[torch.zeros(8, 4)] * 2])
    with pytest.raises(ConfigError, match=r"7 held-out tokens to fit 4 features.*heldout_rows"):
        check_size(recipe, [[torch.zeros(7, 4)] * 2])


@pytest.mark.slow
def test_candidates_are_ranked_in_one_run(tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "choose"
    command = [sys.executable, "-m", "pipeline.choose_layer", *tiny, f"--output_dir={folder}"]
    launcher = f"deepspeed --num_accelerators 1 --master_port {free_port()}"
    done = subprocess.run(
        [*command, "--layers", "4", "2", "--steps", "6", "--launcher", launcher],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "choose_layer.json").read_text())
    assert {entry["layer"] for entry in result["layers"]} == {2, 4}
    shares = [entry["explained"] for entry in result["layers"]]
    assert shares == sorted(shares, reverse=True)
    for entry in result["layers"]:
        by_language = entry["by_language"]
        assert by_language.keys() == {"en", "th"}
        assert entry["explained"] == pytest.approx(sum(by_language.values()) / 2)
        assert f"{entry['layer']:>5}  {entry['explained']:.4f}" in done.stdout
    assert (folder / "choose_layer.png").stat().st_size > 1000
    assert (folder / "layer-02" / "student" / "model.safetensors").exists()


def test_refusals(tiny: list[str]) -> None:
    recipe, _ = load_recipe(tiny)
    assert candidates(recipe, None) == [3, 4]
    assert candidates(recipe, [4, 1, 4]) == [1, 4]
    with pytest.raises(ConfigError, match=r"--layers has 9, .* layers 1 to 4"):
        candidates(recipe, [9])
    with pytest.raises(ConfigError, match="last layer only"):
        main([*tiny, "--objective.name=distilbert"])
    with pytest.raises(ConfigError, match="did you mean"):
        main([*tiny, "--train.max_step=3"])
