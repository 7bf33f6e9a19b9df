"""The student as an ordinary Hugging Face folder, from sharded checkpoints of any ZeRO stage.

`python -m pipeline.export --run RUN [--checkpoint step-00000100]`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_prep.command import EXIT_FINISHED, ConfigError, OptionParser, run_command
from pipeline.checkpoint import State, newest_state, read_state, tag_of
from pipeline.config import Recipe, load_recipe
from pipeline.engine import read_weights
from pipeline.metrics import METRICS, read_lines
from pipeline.models import num_word_embeddings, parameter_shapes
from pipeline.vocabulary import in_words

CONFIG = "config.yaml"
START = "student-start"  # the untrained student: its config, tokenizer and what no loss reaches


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run's newest checkpoint, or the one that is named."""
    parser = OptionParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a training run")
    parser.add_argument("--checkpoint", help="folder name, e.g. step-00000100; default the newest")
    options = parser.parse_args(argv)
    run: Path = options.run
    if not (run / CONFIG).is_file():
        raise ConfigError(f"--run {run} has no {CONFIG}, so it is no run; name its output_dir")
    recipe, _ = load_recipe(["--config", str(run / CONFIG)])
    folder = run / "checkpoints"
    if options.checkpoint:
        known = sorted(p.name for p in folder.glob("step-*") if p.is_dir())
        if options.checkpoint not in known:
            raise ConfigError(f"--checkpoint {options.checkpoint} is not one of {', '.join(known)}")
        state = read_state(folder / options.checkpoint)
    else:
        newest = newest_state(folder)
        if newest is None:
            raise ConfigError(f"{folder} holds no whole checkpoint, so there is nothing to export")
        state = newest
    print(export_student(recipe, run, state))
    return EXIT_FINISHED


def save_start(config: Any, tokenizer: Any, untrained: dict[str, torch.Tensor], run: Path) -> None:
    """Keep what the engine does not hold, so that any checkpoint can be exported by itself.

    Args:
        config: the student's transformers configuration.
        tokenizer: the teacher's.
        untrained: fp32 weights that no loss reaches, by their names in the whole model.
        run: output_dir.
    """
    folder, partial = run / START, run / f".{START}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    save_file(untrained, partial / "untrained.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def export_student(recipe: Recipe, run: Path, state: State) -> Path:
    """Write RUN/student/ from a checkpoint: fp32 weights, tokenizer, configuration, model card.

    Returns:
        The folder, which replaces an older one only when it is whole.
    """
    folder, partial = run / "student", run / ".student.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run / START, partial)
    untrained = load_file(partial / "untrained.safetensors")
    (partial / "untrained.safetensors").unlink()
    shapes = parameter_shapes(partial)
    trained = {name: shape for name, shape in shapes.items() if name not in untrained}
    weights = read_weights(run / "checkpoints", tag_of(state.step), trained)
    whole = {name: {**untrained, **weights}[name].contiguous() for name in sorted(shapes)}
    save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
    card = _model_card(recipe, run, state, whole, sorted(untrained))
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _model_card(
    recipe: Recipe, run: Path, state: State, weights: dict[str, Any], untrained: list[str]
) -> str:
    lines = [line for line in read_lines(run / METRICS) if line["step"] <= state.step]
    heldout = [line for line in lines if "heldout_loss" in line]
    prefix = "heldout_loss_"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(
            yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")), sort_keys=False
        ),
        state=state,
        losses=[line for line in lines if "loss" in line],
        languages=sorted(k.removeprefix(prefix) for k in (heldout[-1] if heldout else {})
                         if k.startswith(prefix)),
        heldout=heldout[-1] if heldout else None,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        num_embeddings=num_word_embeddings(run / START),
        untrained=untrained,
        vocabulary=_vocabulary(recipe, run),
        is_cut=any(not name.startswith("pooler.") for name in untrained),
    )  # fmt: skip


def _vocabulary(recipe: Recipe, run: Path) -> str | None:
    """Which of the teacher's tokens the student knows, in words; None is all."""
    if recipe.student.vocabulary == "full":
        return None
    facts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return in_words(facts["vocabulary"])


if __name__ == "__main__":
    run_command(main)
