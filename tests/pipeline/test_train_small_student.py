"""A student that starts from its teacher and knows only the tokens of its corpus."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from tests.pipeline.launch import fork, has_step, metrics, run, training, wait_for


@pytest.mark.slow
def test_a_started_and_trimmed_student_on_other_numbers_of_ranks(
    tiny: list[str], tmp_path: Path
) -> None:
    trimmed = ["--student.vocabulary=corpus", "--student.vocabulary_min_count=3"]
    small = [*tiny, "--student.init=svd", *trimmed]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    with fork(small, ranks=2, stage="zero3") as running:
        wait_for(has_step(folder, 4))
        running.ranks()[0].send_signal(signal.SIGUSR1)
        stopped = running.wait()
    assert stopped.status == 85, stopped.output
    other = run([*small, "--student.vocabulary_min_count=4"], stage="zero3", begin=fork)
    assert other.status == 2
    assert "student.vocabulary_min_count" in other.errors[0]
    resumed = run(small, stage="zero3", begin=fork)
    assert resumed.status == 0, resumed.output

    straight = run([*small, f"--output_dir={whole}"], stage="zero3", begin=fork)
    assert straight.status == 0, straight.output
    for ours, theirs in zip(training(folder), training(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert (folder / "vocabulary.npz").read_bytes() == (whole / "vocabulary.npz").read_bytes()

    model = AutoModel.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    num_tokens = model.config.vocab_size
    assert len(tokenizer) == num_tokens == model.get_input_embeddings().num_embeddings < 16000
    model(**tokenizer("some text ภาษาไทย", return_tensors="pt"))
    facts = json.loads((folder / "provenance.json").read_text())["vocabulary"]
    assert facts["tokens_kept"] == num_tokens
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 50 < facts["coverage_percent"] < 100
    first = metrics(folder)[0]
    assert (first["step"], first["vocabulary_tokens_kept"]) == (0, num_tokens)
    said = f"{num_tokens:,} of 16,000 tokens kept, {facts['coverage_percent']:.3f}%"
    assert f"vocabulary: {said}" in stopped.output
    assert said in (folder / "student" / "README.md").read_text()
