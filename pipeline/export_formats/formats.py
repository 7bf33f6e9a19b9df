"""The formats beside the Hugging Face model, written into its folder and compared with it."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data_prep.command import ConfigError
from pipeline.export_formats.difference import Heldout, LastLayerRun, compare, demo_text, padded
from pipeline.export_formats.onnx_files import Arrays, open_onnx, quantise, write_onnx
from pipeline.export_formats.sentence_embedding import write_sentence_transformer
from pipeline.models import (
    HIDDEN,
    LastLayer,
    NamedOutputs,
    input_names,
    load_tokenizer,
    load_with_head,
    longest_segment,
)

WEIGHTS = "model.safetensors"
ONNX_FILES = {"onnx": "model.onnx", "onnx-int8": "model_int8.onnx"}
LAST_LAYER = ("last_hidden_state", "query", "key", "value")


class Exported:
    """A folder's model, of which other formats are made and with which they are compared.

    Args:
        folder: a Hugging Face model in fp32 with its tokenizer.
        heldout: rows of its run; None measures on the text that comes with this project.
    """

    def __init__(self, folder: Path, heldout: Heldout | None) -> None:
        self.folder, self._heldout = folder, heldout
        model, self.outputs = load_with_head(str(folder))
        self._tokenizer = load_tokenizer(str(folder))
        self._is_encoder = self.outputs == HIDDEN
        self._encoder = model.base_model if self._is_encoder else model
        self._module = NamedOutputs(self._encoder, self.outputs)
        self._inputs = input_names(self._encoder, self._tokenizer)
        limits = longest_segment(model.config), self._tokenizer.model_max_length
        self.max_tokens = int(min(limits))
        text = None if heldout is None else heldout.text
        self.text = text or demo_text(self._tokenizer, self.max_tokens)

    def add_onnx(self, formats: Collection[str]) -> dict[str, Any]:
        """Write the ONNX files that are asked for; what formats.json says of each."""
        facts: dict[str, Any] = {}
        (self.folder / "onnx").mkdir()
        example = {
            name: torch.from_numpy(array)
            for name, array in padded([[5] * 9, [5] * 4], self._tokenizer.pad_token_id).items()
            if name in self._inputs
        }
        with tempfile.TemporaryDirectory() as scratch:
            made = _both(Path(scratch), self._module, example, self.outputs)
            losses = self._heldout_losses(Path(scratch) / "last-layer")
            for name in formats:
                difference = self._difference(open_onnx(made[name]))
                if name in losses:
                    difference["heldout_loss"] = losses[name]
                    difference["heldout_loss_pytorch"] = losses["pytorch"]
                file = f"onnx/{ONNX_FILES[name]}"
                shutil.move(made[name], self.folder / file)
                facts[name] = {"files": [file], "difference": difference}
        return facts

    def _heldout_losses(self, scratch: Path) -> dict[str, float]:
        """The objective's value of the student in PyTorch and of its ONNX files."""
        if self._heldout is None or not self._is_encoder:
            return {}
        last_layer = LastLayer(self._encoder)
        scratch.mkdir()
        made = _both(scratch, last_layer, {"input_ids": torch.full((1, 9), 5)}, LAST_LAYER)
        students: dict[str, LastLayerRun] = {"pytorch": torch.no_grad()(last_layer)}
        for name, path in made.items():
            students[name] = functools.partial(_run_last_layer, open_onnx(path))
        return self._heldout.losses(students)

    def add_sentence_transformer(self) -> dict[str, Any]:
        """Write how embeddings are pooled; what formats.json says of it.

        Raises:
            ConfigError: the model gives logits, not embeddings.
        """
        if not self._is_encoder:
            raise ConfigError(
                f"--formats sentence-transformers makes embeddings, and this model gives "
                f"{' and '.join(self.outputs)}; export the encoder that it was fine-tuned from"
            )
        width = self._encoder.config.hidden_size
        return {"files": write_sentence_transformer(self.folder, width, self.max_tokens)}

    def lower_to_bfloat16(self) -> dict[str, Any]:
        """Round the folder's weights to bfloat16; what formats.json says of them."""
        weights = load_file(self.folder / WEIGHTS)
        rounded = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }
        save_file(rounded, self.folder / WEIGHTS, metadata={"format": "pt"})
        path = self.folder / "config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), "dtype": "bfloat16"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        module = copy.deepcopy(self._module).bfloat16()
        run = functools.partial(run_torch, module, self._inputs)
        return {"files": [WEIGHTS], "difference": self._difference(run)}

    def _difference(self, run: Any) -> dict[str, Any]:
        reference = functools.partial(run_torch, self._module, self._inputs)
        return compare(reference, run, self.text.segments, self._tokenizer.pad_token_id)


def add_formats(
    folder: Path, formats: Collection[str], dtype: str, heldout: Heldout | None
) -> dict[str, Any]:
    """Write the formats that are asked for, and measure them.

    Args:
        folder: a Hugging Face model in fp32 with its tokenizer.
        formats: names as in pipeline/export.py; "hf" is there already.
        dtype: float32 or bfloat16: of the folder's own weights in the end.
        heldout: rows of the run; None measures on the text that comes with this project.

    Returns:
        What formats.json is to hold: `text`, what was measured on, and `formats`: of each the
        `files`, their `bytes` and, where it computes something of its own, the `difference`.

    Raises:
        ConfigError: the model has no such format.
    """
    exported = Exported(folder, heldout)
    found: dict[str, Any] = {}
    if "sentence-transformers" in formats:
        found["sentence-transformers"] = exported.add_sentence_transformer()
    if onnx := [name for name in ONNX_FILES if name in formats]:
        found |= exported.add_onnx(onnx)
    if dtype == "bfloat16":
        found["hf"] = exported.lower_to_bfloat16()
    for facts in found.values():
        facts["bytes"] = sum((folder / file).stat().st_size for file in facts["files"])
    return {"text": exported.text.source, "formats": found}


def _both(
    folder: Path, module: Any, example: dict[str, torch.Tensor], outputs: tuple[str, ...]
) -> dict[str, Path]:
    """The two ONNX files of a module."""
    paths = {name: folder / file for name, file in ONNX_FILES.items()}
    write_onnx(module, example, outputs, paths["onnx"])
    quantise(paths["onnx"], paths["onnx-int8"])
    return paths


@torch.no_grad()
def run_torch(module: Any, names: tuple[str, ...], inputs: Arrays) -> Arrays:
    """The outputs of a `NamedOutputs` in fp32, given those of the inputs that it takes."""
    outputs = module(**{name: torch.from_numpy(inputs[name]) for name in names})
    return {
        name: tensor.float().numpy() for name, tensor in zip(module.names, outputs, strict=True)
    }


def _run_last_layer(run: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outputs = run({"input_ids": input_ids.numpy()})
    return tuple(torch.from_numpy(outputs[name]) for name in LAST_LAYER)
