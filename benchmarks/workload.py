"""The step that is measured: a teacher and a student of published shapes, on synthetic paragraphs.

Speed depends on shapes and lengths alone, so weights are random and ids are drawn by Zipf's law.
Lengths follow a clipped lognormal with the median (59) and mean (86) of one paragraph of web text.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import XLMRobertaConfig, XLMRobertaModel

from data_prep.pack import best_fit
from pipeline import flops
from pipeline.assignment import DataOrder
from pipeline.checkpoint import Checkpoints, State
from pipeline.config import (
    DEFAULT_DS_CONFIG,
    Objective,
    Recipe,
    Student,
    Teacher,
    Train,
    read_ds_config,
)
from pipeline.engine import Engine, init_distributed, merge_ds_config
from pipeline.flops import Size, relation_flops, size_of
from pipeline.loader import Batch
from pipeline.models import (
    CutEncoder,
    build_student,
    cut_config,
    load_teacher,
    meta_encoder,
    read_config,
    student_config,
)
from pipeline.objectives import QKV, build_objective
from pipeline.run import Run
from pipeline.stopping import StopRequest
from pipeline.topology import Topology

MEDIAN_TOKENS, SPREAD = 59, 1.05
FIRST_ID = 5  # ids below are special


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A teacher, a student and their rows."""

    teacher_layers: int
    teacher_width: int
    teacher_heads: int
    teacher_layer: int
    relation_heads: int
    vocab_size: int
    seq_len: int
    student_layers: int = 6
    student_width: int = 384
    student_heads: int = 12


BASE = Shape(
    teacher_layers=12,
    teacher_width=768,
    teacher_heads=12,
    teacher_layer=12,
    relation_heads=48,
    vocab_size=60_000,
    seq_len=256,
)
LARGE = Shape(
    teacher_layers=24,
    teacher_width=1024,
    teacher_heads=16,
    teacher_layer=19,
    relation_heads=64,
    vocab_size=250_002,
    seq_len=512,
)
TINY = Shape(
    teacher_layers=3,
    teacher_width=64,
    teacher_heads=4,
    teacher_layer=2,
    relation_heads=8,
    vocab_size=500,
    seq_len=64,
    student_layers=2,
    student_width=32,
    student_heads=2,
)
SHAPES = {"base": BASE, "large": LARGE, "tiny": TINY}


def add_shape_arguments(
    parser: argparse.ArgumentParser, *, batches: int, rows_per_batch: int
) -> None:
    """Options for the shape, and for how much text an optimizer step takes."""
    parser.add_argument("--shape", choices=SHAPES, default="base", help="of models and rows")
    parser.add_argument("--batches", type=int, default=batches, help="micro-batches of a step")
    parser.add_argument("--rows", type=int, default=rows_per_batch, help="rows of a micro-batch")


def paragraphs(shape: Shape, count: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids of `count` paragraphs, none longer than a row."""
    generator = np.random.default_rng(seed)
    lengths = np.round(generator.lognormal(np.log(MEDIAN_TOKENS), SPREAD, count))
    largest = shape.vocab_size - FIRST_ID
    return [
        FIRST_ID + (generator.zipf(1.2, int(n)) - 1) % largest
        for n in lengths.clip(4, shape.seq_len)
    ]


def packed(shape: Shape, texts: Sequence[np.ndarray], rows_per_batch: int) -> Iterator[Batch]:
    """The paragraphs as rows of the shape's length, as the loader gives them."""
    rows = best_fit([len(text) for text in texts], shape.seq_len)
    np.random.default_rng(0).shuffle(rows)  # as preparation does
    for first in range(0, len(rows), rows_per_batch):
        segments = [texts[i] for row in rows[first : first + rows_per_batch] for i in row]
        lengths = np.array([len(segment) for segment in segments])
        yield Batch(
            input_ids=torch.from_numpy(np.concatenate(segments))[None],
            positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
            cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
            max_seqlen=shape.seq_len,
            first_position=first,
            row_ids=tuple(range(first, min(first + rows_per_batch, len(rows)))),
        )


def training_batches(shape: Shape, *, batches: int, rows_per_batch: int) -> list[Batch]:
    """Full batches, drawn from four times as many rows, so that rows are as full as in a run."""
    pool = paragraphs(shape, 1000 + batches * rows_per_batch * shape.seq_len // 20)
    return list(itertools.islice(packed(shape, pool, rows_per_batch), batches))


def segments(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Token ids of each paragraph of the batches, in random order, as lines of a text come."""
    found = [
        batch.input_ids[0, start:stop]
        for batch in batches
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())
    ]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def teacher_config(shape: Shape) -> XLMRobertaConfig:
    """The teacher's configuration, with weights so large that relations are not all but uniform."""
    return XLMRobertaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.teacher_width,
        num_hidden_layers=shape.teacher_layers,
        num_attention_heads=shape.teacher_heads,
        intermediate_size=4 * shape.teacher_width,
        max_position_embeddings=514,
        type_vocab_size=1,
        initializer_range=shape.teacher_width**-0.5,
    )


def save_teacher(shape: Shape, folder: Path) -> None:
    """A random teacher of the shape; `save_pretrained` would import DeepSpeed before its time."""
    config = teacher_config(shape)
    torch.manual_seed(0)
    model = XLMRobertaModel(config, add_pooling_layer=False)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


class FixedLoader:
    """Gives the same micro-batches at every step, so that nothing but the step is measured."""

    def __init__(self, batches: list[Batch], order: DataOrder) -> None:
        self._batches, self.order = batches, order

    def micro_batches(self, step: int) -> list[Batch]:
        """The batches."""
        return self._batches


def make_recipe(
    shape: Shape,
    folder: Path,
    *,
    batches: int,
    rows_per_batch: int,
    compile: bool = False,
    teacher_dtype: Any = "bfloat16",
) -> Recipe:
    """The recipe of a run of the shape on one rank, writing into `folder`."""
    return Recipe(
        output_dir=str(folder / "run"),
        teacher=Teacher(
            model=str(folder / "teacher"), layer=shape.teacher_layer, dtype=teacher_dtype
        ),
        student=Student(
            num_hidden_layers=shape.student_layers,
            hidden_size=shape.student_width,
            num_attention_heads=shape.student_heads,
            intermediate_size=4 * shape.student_width,
        ),
        objective=Objective(num_relation_heads=shape.relation_heads),
        train=Train(
            max_steps=1_000_000,
            batch_size=batches * rows_per_batch,
            micro_batch_size=rows_per_batch,
            log_every=10,
            compile=compile,
        ),
    )


def make_run(recipe: Recipe, batches: list[Batch], ds_config: Path = DEFAULT_DS_CONFIG) -> Run:
    """What `pipeline.loop.train_step` works with: the real teacher, engine and optimizer."""
    topology = Topology.from_environment()
    device = init_distributed(topology)
    of_teacher = read_config("teacher.model", recipe.teacher.model)
    config = student_config(recipe.student, of_teacher)
    teacher = load_teacher(recipe, device)
    student = CutEncoder(build_student(recipe.student, config, recipe.seed))
    if recipe.train.compile:
        student.compile_layers()
        places = recipe.train.micro_batch_size * batches[0].max_seqlen
        batches = [dataclasses.replace(batch, shape=places) for batch in batches]
    objective = build_objective(recipe, of_teacher, config)
    merged = merge_ds_config(read_ds_config(str(ds_config)), recipe, topology.world_size)
    engine = Engine(student, recipe, merged, load_universal=False)
    engine.train(True)
    micro = recipe.train.micro_batch_size
    order = DataOrder(
        num_rows=len(batches) * micro,
        rows_per_block=micro,
        batch_size=recipe.train.batch_size,
        micro_batch_size=micro,
        seed=recipe.seed,
    )
    return Run(
        recipe=recipe,
        topology=topology,
        device=device,
        stop=StopRequest(),
        loader=FixedLoader(batches, order),  # type: ignore[arg-type]
        heldout={},
        objective=objective,
        teacher=teacher,
        teacher_weights=teacher.replicas,
        engine=engine,
        checkpoints=Checkpoints(Path(recipe.output_dir), topology, keep=1),
        metrics=None,
        row_log=None,
        state=State(step=0, tokens=0, world_size=topology.world_size, identity={}),
        bar=tqdm(disable=True),
        hosts=["this one"] * topology.world_size,
    )


@functools.cache
def sizes(shape: Shape) -> tuple[Size, Size]:
    """Of the cut teacher and the cut student."""
    recipe = make_recipe(shape, Path(), batches=1, rows_per_batch=1)
    of_teacher = teacher_config(shape)
    student = meta_encoder(student_config(recipe.student, of_teacher), QKV)
    return size_of(meta_encoder(cut_config(of_teacher, shape.teacher_layer), QKV)), size_of(student)


def part_flops(shape: Shape, lengths: Sequence[int]) -> dict[str, float]:
    """Matmul FLOPs of a step over these segments, by part; the optimizer multiplies nothing."""
    teacher, student = sizes(shape)
    forward = student.forward_flops(lengths)
    return {
        "teacher forward": teacher.forward_flops(lengths),
        "student forward": forward,
        "loss": relation_flops(teacher, student, lengths),
        "backward": 2 * forward,
        "optimizer step": 0.0,
    }


def student_parameters(shape: Shape) -> tuple[int, int]:
    """Parameters of the cut student, all and those of its word embeddings alone."""
    _, student = sizes(shape)
    return student.parameters, student.words


def step_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Matmul FLOPs that the cut models alone need for a step; what the loss needs is left out."""
    teacher, student = sizes(shape)
    return flops.step_flops(teacher, [student], lengths)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the teacher and the run, removed after use."""
    return tempfile.TemporaryDirectory(prefix="minilm-benchmark-")
