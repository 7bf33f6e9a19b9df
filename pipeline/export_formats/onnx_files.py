"""ONNX files of an encoder: fp32, and int8 for CPUs. docs/export.md says why so and how fast."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from data_prep.command import ConfigError

OPSET = 23  # the first with Attention as one operator
LARGEST = 2 * 1024**3  # bytes that a protocol buffer, and so an ONNX file by itself, may have

Arrays = dict[str, npt.NDArray[Any]]


def write_onnx(
    module: nn.Module, inputs: dict[str, torch.Tensor], outputs: Sequence[str], path: Path
) -> None:
    """Write a module as an ONNX file of any batch and length.

    Args:
        module: in eval mode; takes `inputs` by name and returns a tuple.
        inputs: an example, each [batch, length] int64; an axis of 1 stays 1, others are free.
        outputs: names for what it returns.
        path: of the file; its folder exists.

    Raises:
        ConfigError: the weights do not fit into one file.
    """
    size = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    if size >= LARGEST:
        raise ConfigError(
            f"--formats onnx: the weights are {size / 1e9:.1f} GB, and an ONNX file holds 2 GB at "
            "most; export a smaller model"
        )
    free = (torch.export.Dim("batch"), torch.export.Dim("length"))
    shapes = {
        name: {axis: free[axis] for axis, length in enumerate(tensor.shape) if length > 1}
        for name, tensor in inputs.items()
    }
    with _quiet():
        program = torch.onnx.export(
            module,
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this computer
    del model.graph.value_info[:]  # shapes of what lies between, some of them wrong once quantised
    onnx.save(model, path)


def quantise(source: Path, target: Path) -> None:
    """Write an fp32 file of `write_onnx` with int8 weights.

    Matrix products with weights: a scale for each output channel; what they multiply becomes uint8
    by its range in each call (onnxruntime's dynamic quantisation). Word embeddings: a scale for
    each token.
    """
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    model = onnx.load(target)
    _quantise_word_embeddings(model.graph)
    onnx.save(model, target)


def _quantise_word_embeddings(graph: Any) -> None:
    """Replace the lookup of `input_ids` by one of int8 rows and one of their scales."""
    index, lookup = next(
        (index, node)
        for index, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[1] == "input_ids"
    )
    table = next(tensor for tensor in graph.initializer if tensor.name == lookup.input[0])
    weights = numpy_helper.to_array(table)
    scales = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    rows = np.rint(weights / np.where(scales > 0, scales, 1)).astype(np.int8)
    graph.initializer.remove(table)
    graph.initializer.append(numpy_helper.from_array(rows, "words.rows"))
    graph.initializer.append(numpy_helper.from_array(scales, "words.scales"))
    graph.node.remove(lookup)
    in_place = [
        helper.make_node("Gather", ["words.rows", "input_ids"], ["words.int8"]),
        helper.make_node("Gather", ["words.scales", "input_ids"], ["words.scale"]),
        helper.make_node("Cast", ["words.int8"], ["words.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["words.float", "words.scale"], list(lookup.output)),
    ]
    for offset, node in enumerate(in_place):
        graph.node.insert(index + offset, node)


def open_onnx(path: Path, *, threads: int = 0) -> Callable[[Arrays], Arrays]:
    """A file as a function from named arrays to named arrays, on the CPU.

    Args:
        path: of an ONNX file.
        threads: that compute; 0 is as many as there are cores.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {entry.name for entry in session.get_inputs()}

    def run(inputs: Arrays) -> Arrays:
        feed = {name: array for name, array in inputs.items() if name in wanted}
        return dict(zip(names, session.run(None, feed), strict=True))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own insides, which no user can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
