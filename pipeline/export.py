"""The student as an ordinary Hugging Face folder, from sharded checkpoints of any ZeRO stage.

`python -m pipeline.export --run RUN [--checkpoint step-00000100]` writes RUN/student.
`python -m pipeline.export --model DIR --output_dir OUT` takes any encoder, fine-tuned ones too.
`--formats onnx,onnx-int8,sentence-transformers` adds these to the folder: docs/export.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import torch
import yaml
from safetensors.torch import load_file, save_file

from data_prep.command import (
    EXIT_FINISHED,
    ConfigError,
    OptionParser,
    run_command,
    skip_unreachable_hub,
)
from pipeline.checkpoint import State, newest_state, read_state, tag_of
from pipeline.config import Recipe, load_recipe
from pipeline.engine import read_weights
from pipeline.metrics import METRICS, read_lines
from pipeline.models import (
    longest_segment,
    num_word_embeddings,
    parameter_shapes,
    read_config,
    save_whole,
)
from pipeline.source_card import card_of, licence_of
from pipeline.vocabulary import in_words

CONFIG = "config.yaml"
CARD = "README.md"
START = "student-start"  # the untrained student: its config, tokenizer and what no loss reaches
FORMATS = ("hf", "onnx", "onnx-int8", "sentence-transformers")
DTYPES = ("float32", "bfloat16")
FACTS = "formats.json"  # what the folder holds and how it was measured
FORMATS_HEADING = "## Formats\n"  # where the part of a card that an export writes anew begins


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run's newest checkpoint, the one that is named, or a model of any origin."""
    parser = OptionParser(
        prog="python -m pipeline.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="output_dir of a training run")
    source.add_argument("--model", help="a model's folder or hub id, in place of a run")
    parser.add_argument("--checkpoint", help="folder name, e.g. step-00000100; default the newest")
    parser.add_argument(
        "--output_dir", type=Path, help="replaced whole; default RUN/student, none with --model"
    )
    parser.add_argument(
        "--formats", type=_names, default=["hf"], help=f"some of {','.join(FORMATS)}; default hf"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the HF weights")
    parser.add_argument("--push_to_hub", metavar="NAME", help="USER/MODEL to upload the folder to")
    parser.add_argument("--private", action="store_true", help="a repository that is created")
    options = parser.parse_args(argv)
    _check(options)
    if options.run:
        recipe, state = _read_run(options.run, options.checkpoint)
        _leave_unreachable_hub(recipe.teacher.model)
        folder = export_student(
            recipe,
            options.run,
            state,
            folder=options.output_dir,
            formats=options.formats,
            dtype=options.dtype,
        )
    else:
        _leave_unreachable_hub(options.model)
        folder = export_model(
            options.model, options.output_dir, formats=options.formats, dtype=options.dtype
        )
    print(folder)
    if options.push_to_hub:
        from pipeline.export_formats.hub import push

        print(push(folder, options.push_to_hub, private=options.private))
    return EXIT_FINISHED


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not fit together.

    Raises:
        ConfigError: naming the option.
    """
    if unknown := [name for name in options.formats if name not in FORMATS]:
        raise ConfigError(
            f"--formats {unknown[0]} is not one of {', '.join(FORMATS)}; name some of these, with "
            "commas between them"
        )
    if options.model and options.output_dir is None:
        raise ConfigError(
            f"--model {options.model} needs --output_dir, a new folder: the model's own is left as "
            "it is"
        )
    if options.model and options.checkpoint:
        raise ConfigError("--checkpoint is for --run; a --model has no checkpoints")
    folder: Path | None = options.output_dir
    if folder and folder.exists() and any(folder.iterdir()) and not (folder / FACTS).is_file():
        raise ConfigError(
            f"--output_dir {folder} holds something that is no export (it has no {FACTS}), and "
            "would be replaced whole; name a new folder"
        )
    if folder and options.model and _is_same(Path(options.model), folder):
        raise ConfigError(
            f"--output_dir {folder} is the model's own folder, which would be replaced while it "
            "is read; name another"
        )
    if options.private and not options.push_to_hub:
        raise ConfigError("--private is for --push_to_hub, and nothing is pushed; name a model")
    if options.push_to_hub:
        from pipeline.export_formats.hub import check_hub

        check_hub(options.push_to_hub)


def _leave_unreachable_hub(source: str) -> None:
    """See `skip_unreachable_hub`; the hub's client has read the environment already."""
    skip_unreachable_hub(source)
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _is_same(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)


def _read_run(run: Path, checkpoint: str | None) -> tuple[Recipe, State]:
    if not (run / CONFIG).is_file():
        raise ConfigError(f"--run {run} has no {CONFIG}, so it is no run; name its output_dir")
    recipe, _ = load_recipe(["--config", str(run / CONFIG)])
    folder = run / "checkpoints"
    if checkpoint:
        known = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
        if checkpoint not in known:
            raise ConfigError(f"--checkpoint {checkpoint} is not one of {', '.join(known)}")
        return recipe, read_state(folder / checkpoint)
    newest = newest_state(folder)
    if newest is None:
        raise ConfigError(f"{folder} holds no whole checkpoint, so there is nothing to export")
    return recipe, newest


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


def export_student(
    recipe: Recipe,
    run: Path,
    state: State,
    *,
    folder: Path | None = None,
    formats: Collection[str] = ("hf",),
    dtype: str = "float32",
) -> Path:
    """Write a student from a checkpoint: weights, tokenizer, configuration, formats, model card.

    Args:
        recipe: of the run.
        run: its output_dir.
        state: which checkpoint.
        folder: where to; None is RUN/student.
        formats: some of FORMATS.
        dtype: one of DTYPES, of the Hugging Face weights; the other formats are made from fp32.

    Returns:
        The folder, which replaces an older one only when it is whole.

    Raises:
        ConfigError: the student, its shards or its teacher do not allow a format.
        RunError: the checkpoint or the shards are damaged.
    """
    folder = folder or run / "student"
    partial = _begin(folder)
    shutil.copytree(run / START, partial)
    untrained = load_file(partial / "untrained.safetensors")
    (partial / "untrained.safetensors").unlink()
    shapes = parameter_shapes(partial)
    trained = {name: shape for name, shape in shapes.items() if name not in untrained}
    weights = read_weights(run / "checkpoints", tag_of(state.step), trained)
    whole = {name: {**untrained, **weights}[name].contiguous() for name in sorted(shapes)}
    save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})

    facts = None
    if _adds(formats, dtype):
        from pipeline.export_formats.difference import Heldout
        from pipeline.export_formats.formats import add_formats

        facts = add_formats(partial, formats, dtype, Heldout(recipe, state, partial))
    _write_facts(partial, facts)
    card = _model_card(recipe, run, state, whole, sorted(untrained), facts)
    (partial / CARD).write_text(card, encoding="utf-8")
    return _finish(partial, folder)


def export_model(
    source: str, folder: Path, *, formats: Collection[str] = ("hf",), dtype: str = "float32"
) -> Path:
    """Write a model of any origin, with its head if it has one, and formats of it.

    Args:
        source: folder or hub id of an encoder, bare or fine-tuned.
        folder: where to.
        formats: some of FORMATS.
        dtype: one of DTYPES, of the Hugging Face weights.

    Returns:
        The folder, which replaces an older one only when it is whole. Its card is the model's own
        with the formats added.

    Raises:
        ConfigError: the model does not load, or has no such format.
    """
    partial = _begin(folder)
    save_whole(source, partial)
    facts = None
    if _adds(formats, dtype):
        from pipeline.export_formats.formats import add_formats

        facts = add_formats(partial, formats, dtype, None)
    _write_facts(partial, facts)
    own = card_of(source)
    card = own or _render("converted_card.md.j2", name=folder.name, source=source)
    if facts is not None:
        card = card.partition(FORMATS_HEADING)[0].rstrip() + "\n\n" + _render_formats(facts)
    (partial / CARD).write_text(card, encoding="utf-8")
    return _finish(partial, folder)


def _begin(folder: Path) -> Path:
    """Where a folder is written before it is whole."""
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return partial


def _finish(partial: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _write_facts(folder: Path, facts: dict[str, Any] | None) -> None:
    content = facts or {"text": None, "formats": {}}
    (folder / FACTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _adds(formats: Collection[str], dtype: str) -> bool:
    return bool(set(formats) - {"hf"}) or dtype != DTYPES[0]


def _model_card(
    recipe: Recipe,
    run: Path,
    state: State,
    weights: dict[str, Any],
    untrained: list[str],
    facts: dict[str, Any] | None,
) -> str:
    lines = [line for line in read_lines(run / METRICS) if line["step"] <= state.step]
    heldout = [line for line in lines if "heldout_loss" in line]
    prefix = "heldout_loss_"
    return _render(
        "model_card.md.j2",
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
        max_tokens=longest_segment(read_config("student", str(run / START))),
        licence=licence_of(recipe.teacher.model),
        teacher_id=None if Path(recipe.teacher.model).exists() else recipe.teacher.model,
        formats=None if facts is None else _render_formats(facts),
        gives_sentences=facts is not None and "sentence-transformers" in facts["formats"],
    )  # fmt: skip


def _render_formats(facts: dict[str, Any]) -> str:
    """The part of a card that says what else the folder holds."""
    return FORMATS_HEADING + _render("model_card_formats.md.j2", **facts)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _vocabulary(recipe: Recipe, run: Path) -> str | None:
    """Which of the teacher's tokens the student knows, in words; None is all."""
    if recipe.student.vocabulary == "full":
        return None
    facts = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    return in_words(facts["vocabulary"])


if __name__ == "__main__":
    run_command(main)
