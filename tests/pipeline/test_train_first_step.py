"""The first logged loss against a plain transformers forward over each segment alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from transformers import AutoModel

from tests.pipeline.launch import fork, run, start, training


def segments_of(shards: Path, pad: int) -> list[list[int]]:
    """Every segment of every training row, read by webdataset alone."""
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))
    segments: list[list[int]] = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        flat, bounds = sample["input_ids.npy"].reshape(-1), sample["cu_seqlens.npy"]
        pieces = [flat[a:b].tolist() for a, b in itertools.pairwise(bounds)]
        segments += [piece for piece in pieces if piece[0] != pad]
    return segments


def relation(vectors: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Log of softmax(X X^T / sqrt(d)) of each head, in float64."""
    tokens, width = vectors.shape
    heads = vectors.double().reshape(tokens, num_heads, width // num_heads).permute(1, 0, 2)
    return torch.log_softmax(heads @ heads.mT / np.sqrt(width // num_heads), dim=-1)


@torch.no_grad()
def oracle(teacher: Path, student: Path, segments: list[list[int]], layer: int, heads: int) -> dict:
    """Mean KL of each relation over heads and tokens, from full-length models in float64."""
    models = [AutoModel.from_pretrained(f).double().eval() for f in (teacher, student)]
    layers = [layer, models[1].config.num_hidden_layers]
    sums, tokens = dict.fromkeys("qkv", 0.0), 0
    for ids in segments:
        vectors = []
        for model, number in zip(models, layers, strict=True):
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            hidden = output.hidden_states[number - 1][0]
            attention = model.encoder.layer[number - 1].attention.self
            vectors.append(
                [attention.query(hidden), attention.key(hidden), attention.value(hidden)]
            )
        for name, t, s in zip("qkv", *vectors, strict=True):
            target, log_student = relation(t, heads), relation(s, heads)
            sums[name] += float((target.exp() * (target - log_student)).sum())
        tokens += len(ids)
    return {f"loss_{name * 2}": total / (heads * tokens) for name, total in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xlmr", "bert"])
@pytest.mark.parametrize(("layer", "implementation"), [(None, "chunked"), (2, "reference")])
def test_the_first_loss_is_the_papers_formula(
    family: str,
    layer: int | None,
    implementation: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    teacher, student = request.getfixturevalue(family)
    shards = request.getfixturevalue(f"{family}_shards")
    manifest = json.loads((shards / "manifest.json").read_text())
    arguments = [
        f"--output_dir={tmp_path / 'run'}",
        f"--teacher.model={teacher}",
        "--teacher.dtype=float32",
        f"--student.model={student}",
        "--student.hidden_dropout_prob=0",
        "--student.attention_probs_dropout_prob=0",
        "--objective.num_relation_heads=12",
        f"--objective.relation_kl={implementation}",
        f"--data.shards={shards}",
        "--train.max_steps=1",
        f"--train.batch_size={manifest['rows']}",
        f"--train.micro_batch_size={manifest['rows'] if implementation == 'chunked' else 1}",
        *([f"--teacher.layer={layer}"] if layer else []),
    ]
    begin = start if (family, implementation) == ("xlmr", "chunked") else fork
    outcome = run(arguments, stage="zero2_fp32", begin=begin)
    assert outcome.status == 0, outcome.output
    (line,) = training(tmp_path / "run")
    expected = oracle(
        teacher, student, segments_of(shards, manifest["special_ids"]["pad"]), layer or 4, 12
    )
    assert min(expected.values()) > 1e-3  # the comparison is not between zeros
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-5)
    assert line["loss"] == pytest.approx(sum(expected.values()), rel=1e-5)
