"""How fast the student is beside its teacher, measured where this runs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Recipe
from pipeline.models import load_whole

BATCH = 8
REPEATS = 15


def compare_inference(recipe: Recipe, student: Path, seq_len: int) -> dict[str, Any]:
    """Median forward time of whole teacher and whole student, fp32, interleaved.

    Args:
        recipe: names the teacher.
        student: exported folder.
        seq_len: tokens a row; rows are full.

    Returns:
        `teacher` and `student` with parameters, embeddings, milliseconds and tokens_per_second,
        their `speedup`, and the `conditions` in words.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # comparable where something else keeps a core busy
    models = {
        "teacher": load_whole(recipe.teacher.model, device),
        "student": load_whole(str(student), device),
    }
    smallest = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, smallest, (BATCH, seq_len), generator=generator).to(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(REPEATS + 3):  # the first three warm up
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 3:
                    times[name].append(time.perf_counter() - started)
    figures: dict[str, Any] = {}
    for name, model in models.items():
        seconds = statistics.median(times[name])
        figures[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "embeddings": model.get_input_embeddings().weight.numel(),
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": BATCH * seq_len / seconds,
        }
    where = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU thread"
    speedup = figures["teacher"]["milliseconds"] / figures["student"]["milliseconds"]
    conditions = (
        f"median of {REPEATS} forward passes each, interleaved, {BATCH} x {seq_len} tokens, fp32, "
        f"{where}"
    )
    return {**figures, "speedup": speedup, "conditions": conditions}
