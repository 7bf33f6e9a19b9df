"""The benchmarks run, in a shape so small that their figures say nothing, and compare equals."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import attention, export_speed, gpu_suite, relation_kl, scaling, startup, workload
from benchmarks.dense import dense_relation_kl
from benchmarks.harness import MALLOC
from benchmarks.padded import PaddedLoop

ROOT = Path(__file__).parents[2]
QUICK = ["--json", "--no_save", "--shape", "tiny"]
KEYS = {"benchmark", "device", "date", "revision", "versions", "rows", "ratio"}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def checked(text: str, name: str) -> dict[str, Any]:
    result = json.loads(text)
    assert result.keys() >= KEYS
    assert result["benchmark"] == name
    columns = result["rows"][0].keys()
    assert all(row.keys() == columns for row in result["rows"])
    assert math.isfinite(result["ratio"]["value"])
    assert result["ratio"]["value"] > 0
    return result


def test_mfu_started_from_another_folder(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "mfu.py")
    command = [sys.executable, script, *QUICK, "--rows", "4", "--repeats", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = checked(done.stdout, "mfu")
    flops = {row["part"]: row["GFLOP"] for row in result["rows"]}
    whole = flops.pop("whole step")
    assert sum(flops.values()) - flops["loss"] == pytest.approx(whole)


def test_export_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sts.csv").write_text("A cat.,A cat.,5\nA cat.,The law of large numbers,0\n")
    real = ["--sentence_model", str(ROOT / "models" / "pocket-teacher")]
    export_speed.main([*QUICK, "--repeats", "1", *real, "--sts", str(tmp_path / "sts.csv")])
    result = checked(capsys.readouterr().out, "export_speed")
    assert len(result["rows"]) == len(export_speed.CASES)
    assert result["sts"] == pytest.approx(dict.fromkeys(export_speed.STUDENTS, 100))


def test_those_with_an_engine(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("with_an_engine.py")), str(tmp_path)]
    env = {**os.environ, MALLOC: "65536"}  # as in `in_fresh_process`
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    step, memory, speed = done.stdout.splitlines()

    result = checked(step, "step_vs_padded")
    assert [row["step"] for row in result["rows"]] == [
        "padded fp32",
        "padded bf16",
        "ours",
        "floor",
    ]
    assert result["rows"][2]["time / ours"] == 1
    losses = result["losses"]
    assert losses["ours fp32"] == pytest.approx(losses["padded fp32"], rel=1e-5)
    assert 0 < result["real_tokens_among_padded"] < 1

    rows = checked(memory, "peak_memory")["rows"]
    assert [row["step"] for row in rows] == ["padded fp32", "padded bf16", "ours"]
    assert float(speed) > 0


def test_relation_kl(capsys: pytest.CaptureFixture[str]) -> None:
    relation_kl.main([*QUICK, "--repeats", "1"])
    result = checked(capsys.readouterr().out, "relation_kl")
    assert result["ratio"]["value"] == result["rows"][-1]["memory ratio"]


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main([*QUICK, "--repeats", "1"])
    assert len(checked(capsys.readouterr().out, "attention")["rows"]) == 4


def test_scaling(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "measure", lambda options, folder, ranks: 100.0 * ranks**0.5)
    scaling.main([*QUICK, "--ranks", "1", "1000"])
    result = checked(capsys.readouterr().out, "scaling")
    assert result["skipped_ranks"] == [1000]
    assert result["projection"]["rows"][0]["GPUs"] == 8

    scaling.main([*QUICK, "--ranks", "1", "1024", "--oversubscribe"])
    result = checked(capsys.readouterr().out, "scaling")
    assert result["ratio"]["value"] == pytest.approx(1 / 32)


def test_projected_time_follows_the_ring() -> None:
    network = scaling.Network(ranks_per_node=8, rank_bytes=4e9, node_bytes=1e9, overlap=0.5)
    assert network.all_reduce_seconds(8, 4e9) == pytest.approx(2 * 7 / 8)
    assert network.all_gather_seconds(16, 4e9) == pytest.approx(15 / 16 * 4)
    rows = scaling.projection(network, tokens=1000, micro_batches=3, flops=1e12)
    first, third = rows[0], rows[2 * len(scaling.GPUS)]
    parameters, words = workload.student_parameters(workload.LARGE)
    more = (words + 3 * (parameters - words)) / parameters
    assert third["all-reduce ms"] == pytest.approx(more * first["all-reduce ms"])
    parts = first["compute ms"] + first["all-reduce ms"] + first["all-gather ms"]
    half = 1e3 * network.all_reduce_seconds(8, 4 * parameters) / 2  # the other half is hidden
    assert first["all-reduce ms"] == pytest.approx(half)
    assert first["step ms"] == pytest.approx(parts)


def test_student_parameters_are_those_of_the_run() -> None:
    layer = 4 * 32 * 32 + 2 * 32 * 128 + 4 * 32 + 128 + 32 + 2 * 2 * 32
    cut = 3 * (32 * 32 + 32)
    embeddings = (500 + 514 + 1 + 2) * 32
    assert workload.student_parameters(workload.TINY) == (embeddings + layer + cut, 500 * 32)


def test_floor_counts_every_multiplication_of_the_cut_models() -> None:
    lengths, teacher, student = [3, 5], 64, 32
    linear = 12 * teacher**2 + 3 * teacher**2 + 3 * (12 * student**2 + 3 * student**2)
    attention_pairs = (3**2 + 5**2) * 2 * (teacher + 3 * student)
    expected = 2 * (linear * 8 + attention_pairs)
    assert workload.step_flops(workload.TINY, lengths) == pytest.approx(expected)
    parts = workload.part_flops(workload.TINY, lengths)
    assert sum(parts.values()) - parts["loss"] == pytest.approx(expected)


def test_seconds_by_package() -> None:
    text = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch.nn
import time:       200 |        900 | torch
import time:        50 |         50 | os
"""
    assert startup.seconds_by_package(text) == pytest.approx({"torch": 3e-4, "os": 5e-5})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_suite_names_benchmarks_that_there_are() -> None:
    for script, _, _ in gpu_suite.SUITE.values():
        assert (ROOT / "benchmarks" / f"{script}.py").exists()
    assert sum(limit for _, limit, _ in gpu_suite.SUITE.values()) < 8 * 60


def test_dense_formula_equals_its_definition_in_float64() -> None:
    """One paragraph, head, query and key at a time."""
    generator = np.random.default_rng(0)
    lengths, heads = [4, 2, 1], 2
    student, teacher = generator.normal(size=(3, 4, 6)), generator.normal(size=(3, 4, 8))
    total = 0.0
    for number, length in enumerate(lengths):
        for head in range(heads):
            s, t = (
                x[number, :length, head * x.shape[2] // heads : (head + 1) * x.shape[2] // heads]
                for x in (student, teacher)
            )
            for query in range(length):
                p, q = (np.exp(x @ x[query] / math.sqrt(x.shape[1])) for x in (t, s))
                p, q = p / p.sum(), q / q.sum()
                total += float((p * np.log(p / q)).sum())
    mask = torch.tensor([[1] * length + [0] * (4 - length) for length in lengths])
    loss = dense_relation_kl(torch.from_numpy(student), torch.from_numpy(teacher), mask, heads)
    assert float(loss) == pytest.approx(total / (heads * sum(lengths)), rel=1e-12)


def test_padded_loop_equals_one_paragraph_at_a_time_in_float64(tmp_path: Path) -> None:
    """Neither padding, nor micro-batches, nor autocast change what is trained."""
    shape = workload.TINY
    workload.save_teacher(shape, tmp_path / "teacher")
    recipe = workload.make_recipe(shape, tmp_path, batches=1, rows_per_batch=4)
    texts = [torch.from_numpy(text) for text in workload.paragraphs(shape, 7)]
    loop = PaddedLoop(recipe, torch.float32, torch.device("cpu"), sequences=3)
    loss = loop.loss(texts)

    expected = 0.0
    models = [loop.teacher.double(), loop.student.double().eval()]
    with torch.no_grad():
        for text in texts:
            vectors = []
            for model, layer in zip(
                models, (shape.teacher_layer, shape.student_layers), strict=True
            ):
                hidden = model(text[None], output_hidden_states=True).hidden_states[layer - 1][0]
                part = model.encoder.layer[layer - 1].attention.self
                vectors.append([part.query(hidden), part.key(hidden), part.value(hidden)])
            for t, s in zip(*vectors, strict=True):
                t, s = (relations(x, shape.relation_heads) for x in (t, s))
                expected += float((t * (t / s).log()).sum()) / shape.relation_heads
    expected /= sum(len(text) for text in texts)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1


def relations(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    split = vectors.view(len(vectors), heads, -1).transpose(0, 1)
    return (split @ split.transpose(1, 2) / math.sqrt(split.shape[2])).softmax(dim=-1)


def test_padded_steps_lower_the_loss(tmp_path: Path) -> None:
    shape = workload.TINY
    workload.save_teacher(shape, tmp_path / "teacher")
    recipe = workload.make_recipe(shape, tmp_path, batches=1, rows_per_batch=4)
    texts = [torch.from_numpy(text) for text in workload.paragraphs(shape, 7)]
    loop = PaddedLoop(recipe, torch.bfloat16, torch.device("cpu"), sequences=3)
    before = loop.loss(texts)
    for _ in range(5):
        loop.step(texts)
    assert loop.loss(texts) < before


def test_training_batches_are_full_and_their_text_is_the_same() -> None:
    batches = workload.training_batches(workload.TINY, batches=3, rows_per_batch=8)
    tokens = sum(batch.num_tokens for batch in batches)
    assert tokens > 0.98 * 3 * 8 * workload.TINY.seq_len
    texts = workload.segments(batches)
    packed = torch.cat([batch.input_ids[0] for batch in batches])
    assert torch.equal(torch.cat(texts).sort().values, packed.sort().values)


def test_results_are_kept_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path / "results")
    attention.main(["--json", "--shape", "tiny", "--repeats", "1"])
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.name.startswith("attention.")
    checked(kept.read_text("utf-8"), "attention")
    assert os.listdir(tmp_path) == ["results"]
