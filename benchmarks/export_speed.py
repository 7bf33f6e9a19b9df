"""Inference on a CPU: the student in PyTorch, as ONNX in fp32 and int8, and its teacher.

    python benchmarks/export_speed.py [--json] [--sentence_model DIR --sts FILE.csv]

Random weights of the shape; ids without padding, batch x length of CASES. CPU seconds of one
thread, all forms in turn in one process, so that other load of the host falls on all alike. With
--sts (lines "sentence,sentence,score") also what the forms of a real sentence model keep: Spearman
correlation of cosines with the scores, in points.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.stats
import torch

from benchmarks.harness import arguments, report, set_threads
from benchmarks.workload import SHAPES, make_recipe, save_teacher
from pipeline.export_formats.difference import Run, mean_pooled, padded
from pipeline.export_formats.formats import run_torch
from pipeline.export_formats.onnx_files import open_onnx, quantise, write_onnx
from pipeline.models import (
    HIDDEN,
    NamedOutputs,
    build_student,
    load_tokenizer,
    load_whole,
    read_config,
    student_config,
)

CASES = [(1, 16), (1, 128), (8, 128), (32, 32), (2, 512)]  # batch, length
INPUTS = ("input_ids", "attention_mask")
STUDENTS = ("PyTorch fp32", "ONNX fp32", "ONNX int8")
TEACHER = "teacher, PyTorch fp32"
STS_BATCH = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Export, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="base", help="of teacher and student")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each form")
    parser.add_argument("--sentence_model", type=Path, help="folder of a mean-pooled encoder")
    parser.add_argument("--sts", type=Path, help="CSV of two sentences and a score")
    options = parser.parse_args(argv)
    set_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = speeds(options, Path(name))
        facts = {} if options.sts is None else {"sts": similarity(options, Path(name))}
    slowest = min(row["int8 x PyTorch"] for row in rows)
    report(
        "export_speed",
        rows,
        ("smallest PyTorch fp32 / ONNX int8", slowest),
        options,
        shape=options.shape,
        smallest_teacher_over_int8=min(row["int8 x teacher"] for row in rows),
        **facts,
    )
    for form, points in facts.get("sts", {}).items():
        print(f"STS, {form}: {points:.2f}", file=sys.stderr)


def speeds(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row of the table for each batch and length."""
    shape = SHAPES[options.shape]
    save_teacher(shape, folder / "teacher")
    recipe = make_recipe(shape, folder, batches=1, rows_per_batch=1)
    config = student_config(recipe.student, read_config("teacher.model", str(folder / "teacher")))
    build_student(recipe.student, config, seed=1).save_pretrained(folder / "student")
    cpu = torch.device("cpu")
    forms = forms_of(load_whole(str(folder / "student"), cpu), folder)
    teacher = NamedOutputs(load_whole(str(folder / "teacher"), cpu), HIDDEN)
    forms[TEACHER] = functools.partial(run_torch, teacher, INPUTS)
    generator = np.random.default_rng(0)
    rows = []
    for batch, length in CASES:
        ids = generator.integers(5, shape.vocab_size, (batch, length)).tolist()
        inputs = padded(ids, pad_id=1)
        seconds = cpu_seconds_of(
            {name: functools.partial(run, inputs) for name, run in forms.items()}, options.repeats
        )
        int8 = seconds["ONNX int8"]
        rows.append(
            {
                "batch": batch,
                "length": length,
                **{f"{name}, ms": 1e3 * seconds[name] for name in (*STUDENTS, TEACHER)},
                "int8 x PyTorch": seconds["PyTorch fp32"] / int8,
                "int8 x teacher": seconds[TEACHER] / int8,
            }
        )
    return rows


def forms_of(model: Any, folder: Path) -> dict[str, Run]:
    """A model in PyTorch and as both ONNX files, each on one thread."""
    module = NamedOutputs(model, HIDDEN)
    example = padded([[5] * 9, [5] * 4], model.config.pad_token_id)
    tensors = {name: torch.from_numpy(example[name]) for name in INPUTS}
    write_onnx(module, tensors, HIDDEN, folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model_int8.onnx")
    runs = [
        functools.partial(run_torch, module, INPUTS),
        open_onnx(folder / "model.onnx", threads=1),
        open_onnx(folder / "model_int8.onnx", threads=1),
    ]
    return dict(zip(STUDENTS, runs, strict=True))


def cpu_seconds_of(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each case, all in turn, after two calls of each."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 2):
        for name, case in cases.items():
            started = time.process_time()
            case()
            if repeat >= 2:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def similarity(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Spearman correlation, in points, of each form of the sentence model."""
    tokenizer = load_tokenizer(str(options.sentence_model))
    model = load_whole(str(options.sentence_model), torch.device("cpu"))
    with options.sts.open(encoding="utf-8") as stream:
        lines = list(csv.reader(stream))
    ids = tokenizer([text for line in lines for text in line[:2]], truncation=True)["input_ids"]
    scores = np.array([float(line[2]) for line in lines])
    (folder / "sentences").mkdir()
    return {
        form: 100 * correlation(embeddings(run, ids, tokenizer.pad_token_id), scores)
        for form, run in forms_of(model, folder / "sentences").items()
    }


def embeddings(run: Run, ids: Sequence[list[int]], pad_id: int) -> np.ndarray:
    """[texts, width], normed; batches hold texts of like lengths."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found: list[Any] = [None] * len(ids)
    for start in range(0, len(order), STS_BATCH):
        group = order[start : start + STS_BATCH]
        inputs = padded([ids[index] for index in group], pad_id)
        pooled = mean_pooled(run(inputs)["last_hidden_state"], inputs["attention_mask"] == 1)
        for index, vector in zip(group, pooled, strict=True):
            found[index] = vector / np.linalg.norm(vector)
    return np.stack(found)


def correlation(vectors: np.ndarray, scores: np.ndarray) -> float:
    """Spearman's, of the cosines of vectors 2i and 2i + 1 with the scores."""
    cosines = (vectors[::2] * vectors[1::2]).sum(1)
    return float(scipy.stats.spearmanr(cosines, scores).statistic)


if __name__ == "__main__":
    main()
