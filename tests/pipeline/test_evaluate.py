"""The command as users start it: all kinds, several processes, kills, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer, GPT2Config, XLMRobertaConfig

from data_prep.command import ConfigError
from pipeline import evaluate
from tests.pipeline.conftest import POCKET
from tests.pipeline.launch import ROOT, environment, wait_for

TOWNS = ("Rome", "Oslo", "Lima", "Bonn", "Kyiv", "Cairo")


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind, easy to learn from what they hold."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    for split, number in (("train", 96), ("dev", 16), ("test", 24)):
        rows, questions, tagged = [], [], []
        for i in range(number):
            town, year = draw.choice(TOWNS), draw.randrange(1900, 2000)
            good = draw.random() < 0.5
            rows.append(f"The film was {'very good' if good else 'so bad'} in {town}\t{int(good)}")
            text = f"She was born in {town} in {year}."
            start = text.index(town)
            questions.append({
                "context": text,
                "qas": [{"id": f"{split}{i}", "question": "Where was she born?",
                         "answers": [{"text": town, "answer_start": start}]}],
            })  # fmt: skip
            tagged += [*(f"{word}\t{'B-LOC' if word == town else 'O'}"
                         for word in text[:-1].split()), ""]  # fmt: skip
        write_lines(folder / f"films-{split}.tsv", rows)
        (folder / f"towns-{split}.json").write_text(
            json.dumps({"data": [{"paragraphs": questions}]})
        )
        write_lines(folder / f"places-{split}.txt", tagged)
    write_lines(folder / "en.txt", [f"I saw {town} today" for town in TOWNS])
    write_lines(folder / "xx.txt", [f"{town} today" for town in TOWNS])
    splits = "\n".join(f"{split}: {{}}-{split}.{{}}" for split in ("train", "dev", "test"))
    of = {
        "films": "kind: classification\ntexts: [0]\nlabel: 1\nmetrics: [accuracy, f1]\n"
        + splits.format(*["films", "tsv"] * 3),
        "towns": "kind: span\nmax_length: 64\n" + splits.format(*["towns", "json"] * 3),
        "places": "kind: tagging\nmax_length: 16\n" + splits.format(*["places", "txt"] * 3),
        "pairs": "kind: retrieval\ndev: '{part}.txt'\ntarget: en.txt\nparts: [xx]",
    }
    for name, text in of.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def arguments(tasks: Path, output_dir: Path, *options: str) -> list[str]:
    names = ",".join(str(tasks / f"{name}.yaml") for name in ("films", "towns", "places", "pairs"))
    return ["--tasks", names, "--data_dir", str(tasks), "--output_dir", str(output_dir),
            "--learning_rates", "1e-3", "--epochs", "3", *options]  # fmt: skip


def start(tasks: Path, output_dir: Path, *options: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.evaluate", *arguments(tasks, output_dir, *options)],
        cwd=ROOT,
        env={**environment(), "HF_HUB_OFFLINE": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def predictions(output_dir: Path, model: str, task: str, part: str = "") -> list[dict[str, Any]]:
    (path,) = (output_dir / "cells" / model / task).glob(f"*/predictions{part}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_processes_and_a_killed_one_leave_the_same_bytes(
    tasks: Path,
    xlmr: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model", str(xlmr[1]), "--against", str(POCKET)]
    killed = start(tasks, tmp_path / "b", *options)
    wait_for(lambda: len(list((tmp_path / "b").rglob("result.json"))) >= 2, timeout_s=600)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("result.json")}
    ranks = [start(tasks, tmp_path / "a", *options, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT="1") for rank in range(2)]  # fmt: skip
    outputs = [ended(rank) for rank in ranks]
    assert any("| task " in output for output in outputs)  # who ends last writes the tables
    done = [line for output in outputs for line in output.splitlines() if line.startswith("[")
            and "/12] " in line]  # fmt: skip
    assert len(done) == 12  # three models, four tasks: each cell was run once

    monkeypatch.setattr(evaluate, "take_rank", lambda: (0, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate.main(arguments(tasks, tmp_path / "b", *options))  # as any restart, without its start
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    output = capsys.readouterr().out
    assert output.count("/12] ") == 12 - len(first)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    results = (tmp_path / "a" / "results.json").read_bytes()
    assert (tmp_path / "b" / "results.json").read_bytes() == results
    tables = (tmp_path / "a" / "retention.md").read_text(encoding="utf-8")
    assert (tmp_path / "b" / "retention.md").read_text(encoding="utf-8") == tables
    assert tables in output
    check(tmp_path / "a", json.loads(results), xlmr[1].parent.name)  # a run's folder, of "student"


def check(output_dir: Path, results: dict[str, Any], student: str) -> None:
    """What the results say is what the predictions give, and the teacher has learnt the tasks."""
    teacher = results["scores"][POCKET.name]
    for task in ("films", "towns", "places"):
        assert teacher[task]["mean"] > 0.8, (task, teacher[task])
        assert results["tasks"][task]["reported"] == "test"
        assert "retention" in results["scores"][student][task]
    rows = predictions(output_dir, POCKET.name, "films")
    assert [row["id"] for row in rows] == [str(i) for i in range(24)]
    accuracy = accuracy_score([r["gold"] for r in rows], [r["predicted"] for r in rows])
    assert teacher["films"]["seeds"]["1"][""]["accuracy"] == accuracy == teacher["films"]["mean"]
    rows = predictions(output_dir, POCKET.name, "pairs", "-xx")
    right = [row["gold"] == row["predicted"] for row in rows]
    assert teacher["pairs"]["mean"] == sum(right) / len(right) > 0.5
    assert results["models"][f"{student}, untrained"]["untrained"]
    assert list(results["models"]) == [student, POCKET.name, f"{student}, untrained"]


def test_what_cannot_be_evaluated_is_refused(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "take_rank", lambda: (0, 1))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    task = ["--tasks", str(tasks / "films.yaml"), "--data_dir", str(tasks)]
    task += ["--output_dir", str(tmp_path / "out")]
    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    XLMRobertaConfig(is_decoder=True).save_pretrained(tmp_path / "decoder")
    (tmp_path / "empty").mkdir()
    XLMRobertaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "mute")
    XLMRobertaConfig(vocab_size=100).save_pretrained(tmp_path / "foreign")
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path / "foreign")
    for name in ("mute", "foreign"):  # these are refused before they are read
        (tmp_path / name / "model.safetensors").touch()
    cases: list[tuple[list[str], str]] = [
        (["--tasks", "xnli"], "--model is not set"),
        (["--model", "x"], "--tasks is not set"),
        (["--model", "x", "--tasks", "xnly"], "did you mean 'xnli'"),
        (["--model", "x", *task, "--epochs", "0"], "--epochs"),
        (["--model", "x", *task, "--seeds", ","], "--seeds"),
        (["--model", "x", *task, "--learning_rate", "1"], "--learning_rate"),
        (["--model", "x", "--tasks", "xnli", "--data_dir", str(tasks)], "xnli needs dev files"),
        (["--model", "nobody/nothing", *task], "'nobody/nothing' does not load"),
        (["--model", str(tmp_path / "none"), *task], "is not a folder"),
        (["--model", str(tmp_path / "empty"), *task], "has no config.json"),
        (["--model", str(tmp_path / "gpt2"), *task], "is a 'gpt2' model"),
        (["--model", str(tmp_path / "decoder"), *task], "has is_decoder=true"),
        (["--model", str(tmp_path / "mute"), *task], "has no tokenizer"),
        (["--model", str(tmp_path / "foreign"), *task], "embeddings for 100"),
        (["--model", str(POCKET), "--against", str(POCKET), *task], "one model twice"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message) as refused:
            evaluate.main(arguments)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_all_weights_is_refused_with_status_2(
    tasks: Path, xlmr: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    for path in xlmr[1].iterdir():
        os.link(path, folder / path.name)
    (folder / "model.safetensors").unlink()
    weights = load_file(xlmr[1] / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    process = start(tasks, tmp_path / "out", "--model", str(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "has no weights for" in error
    assert "layer.1" in error
