"""Which of the teacher's layers to learn from: a short run from each, ranked on held-out text.

    python -m pipeline.choose_layer --config recipes/R.yaml [--layers 16 19 22] [--steps 1000]

All candidates' students train in one run, from one pass of the teacher. Losses of different layers
cannot be compared, since each is measured against its own target. So every student is asked the
same question: how much of the teacher's last hidden states do the vectors that it has learnt, the
queries, keys and values of its last layer, determine linearly? See pipeline/readout.py. MiniLMv2's
authors fine-tuned on tasks instead (arXiv 2012.15828), which takes labels and hours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command import EXIT_FINISHED, ConfigError, OptionParser, run_command
from pipeline.config import Recipe, load_recipe
from pipeline.launching import run_training

RESULT, PLOT = "choose_layer.json", "choose_layer.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Distil briefly from each candidate layer, rank them, print a table, write a plot."""
    parser = OptionParser(
        prog="python -m pipeline.choose_layer",
        description="Rank the teacher's layers to learn from. Other arguments are train.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("--layers", type=int, nargs="+", help="default: the upper half")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each")
    parser.add_argument("--launcher", default="deepspeed", help="what starts pipeline/train.py")
    options, arguments = parser.parse_known_args(argv)
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps} is below 1, so nothing would train; use more")
    recipe, _ = load_recipe(arguments)
    layers = candidates(recipe, options.layers)
    status = distil(recipe, arguments, layers, options)
    if status != EXIT_FINISHED:
        return status
    from pipeline.readout import rank

    ranking = rank(recipe, {layer: student_of(recipe, layer) for layer in layers})
    folder = Path(recipe.output_dir)
    (folder / RESULT).write_text(json.dumps({"steps": options.steps, "layers": ranking}, indent=2))
    plot(ranking, folder / PLOT)
    print(table(ranking))
    print(f"{folder / RESULT}, {folder / PLOT}")
    return EXIT_FINISHED


def candidates(recipe: Recipe, layers: Sequence[int] | None) -> list[int]:
    """The layers to compare, ascending: those asked for, or the upper half of all.

    Raises:
        ConfigError: the teacher lacks one, or the objective has nothing to do with layers.
    """
    from pipeline.models import read_config  # loads transformers: a typo is refused before

    if recipe.objective.name == "distilbert":
        raise ConfigError(
            "objective.name=distilbert learns from the last layer only, so there is nothing to "
            "choose; use minilmv2 or minilm"
        )
    number = read_config("teacher.model", recipe.teacher.model).num_hidden_layers
    chosen = sorted(set(layers or range(number // 2 + 1, number + 1)))
    if foreign := [layer for layer in chosen if not 1 <= layer <= number]:
        raise ConfigError(
            f"--layers has {foreign[0]}, but {recipe.teacher.model} has layers 1 to {number}; use "
            "these"
        )
    return chosen


def distil(
    recipe: Recipe, arguments: Sequence[str], layers: Sequence[int], options: argparse.Namespace
) -> int:
    """Train a student from each layer, in one run, and return its exit status."""
    students = [{"name": name_of(layer), "set": {"teacher.layer": layer}} for layer in layers]
    own = [
        f"--train.max_steps={options.steps}",
        f"--train.warmup_steps={min(recipe.train.warmup_steps, options.steps // 10)}",
        f"--students={json.dumps(students)}",
    ]
    return run_training(options.launcher, [*arguments, *own])


def name_of(layer: int) -> str:
    """What a layer's student is called."""
    return f"layer-{layer:02d}"


def student_of(recipe: Recipe, layer: int) -> str:
    """The folder of a layer's student."""
    return str(Path(recipe.output_dir) / name_of(layer) / "student")


def table(ranking: Sequence[dict[str, Any]]) -> str:
    """The ranking for people."""
    lines = ["layer  share of the teacher's last hidden states that is determined"]
    lines += [f"{entry['layer']:>5}  {entry['explained']:.4f}" for entry in ranking]
    return "\n".join(lines)


def plot(ranking: Sequence[dict[str, Any]], path: Path) -> None:
    """The shares over the layers: the mean, and each language thinly."""
    from matplotlib.figure import Figure

    entries = sorted(ranking, key=lambda entry: int(entry["layer"]))
    layers = [entry["layer"] for entry in entries]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for language in entries[0]["by_language"]:
        axes.plot(layers, [e["by_language"][language] for e in entries], color="#bbbbbb", lw=0.8)
    axes.plot(layers, [e["explained"] for e in entries], color="#2a6f97", marker="o")
    axes.set_xticks(layers)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("share of last hidden states determined")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
