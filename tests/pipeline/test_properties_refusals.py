"""Bad input of every command ends in one line that names it, with the status of its kind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from data_prep.command import run_command
from tests.pipeline.bad_input import (
    CHAINS,
    COMMANDS,
    DS_CONFIGS,
    GOOD,
    GOOD_DS,
    OVERRIDES,
    PREPARATIONS,
    RECIPES,
    Case,
)
from tests.pipeline.conftest import POCKET, TEXT, prepare
from tests.pipeline.launch import ROOT

MODULES = {
    "train": "pipeline.train",
    "build_shards": "data_prep.build_shards",
    **{name: f"data_prep.{name}" for name in ("verify", "inspect")},
    **{name: f"pipeline.{name}" for name in ("export", "report", "choose_layer", "chain")},
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI", "OMPI_", "MPI_")


class AcceptedError(Exception):
    """The command would begin its work."""


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def teacher_like(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A copy of the pocket teacher with another config.json."""
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the cases' `<names>` stand for."""
    root = tmp_path_factory.mktemp("places")
    files = root / "files"
    shards = prepare(POCKET, root / "shards", heldout_rows=2)
    found = {"<teacher>": str(POCKET), "<shards>": str(shards), "<files>": str(files)}
    write(files / "a-file", "text\n")
    write(files / "nothing.jsonl", "")
    for name, (content, _) in {"good": (GOOD, ()), **RECIPES}.items():
        write(files / f"{name}.yaml", filled(content, found))
    for name, (content, _) in {"good": (GOOD_DS, ()), **DS_CONFIGS}.items():
        write(files / f"{name}.json", content)
    for name, changes in {
        "decoder": {"model_type": "gpt2"},
        "encoder-decoder": {"model_type": "t5"},
        "deberta": {"model_type": "deberta-v2"},
        "is-decoder": {"is_decoder": True},
        "text-width": {"hidden_size": "wide"},
        "no-layers": {"num_hidden_layers": 0},
        "small-vocabulary": {"vocab_size": 100},
        "short-positions": {"max_position_embeddings": 32},
        "remote-code": {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
    }.items():
        teacher_like(files / name, lambda config, changes=changes: config.update(changes))
    write(files / "remote-code" / "own.py", f"open({str(files / 'executed')!r}, 'w')\n")
    teacher_like(files / "no-type", lambda config: config.pop("model_type"))
    for name, content in (("bad-config", "{"), ("list-config", "[]")):
        shutil.copytree(POCKET, files / name)
        write(files / name / "config.json", content)
    for name in ("pickle-only", "no-weights", "torn-weights"):
        shutil.copytree(POCKET, files / name)
        (files / name / "model.safetensors").unlink()
    write(files / "pickle-only" / "pytorch_model.bin", b"a pickle")
    write(
        files / "torn-weights" / "model.safetensors",
        (POCKET / "model.safetensors").read_bytes()[:9999],
    )
    for name in ("no-tokenizer", "bad-tokenizer"):
        shutil.copytree(POCKET, files / name)
        (files / name / "tokenizer.json").unlink()
    write(files / "bad-tokenizer" / "tokenizer.json", '{"model": {}}')
    write(files / "empty-run" / "config.yaml", filled(GOOD, found))
    write(files / "odd-metrics" / "metrics.jsonl", "5\n")
    return found


def filled(text: Any, places: dict[str, str]) -> Any:
    if isinstance(text, str):
        for name, path in places.items():
            text = text.replace(name, path)
    return text


@pytest.fixture
def end_of(
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[str, list[str]], tuple[int, str]]]:
    """Runs a command here, up to where it would begin its work; gives its status and stderr."""
    import torch

    from pipeline import assemble
    from pipeline.watchdog import Watchdog

    def accept(*arguments: Any, **options: Any) -> NoReturn:
        raise AcceptedError

    monkeypatch.setattr(assemble, "init_distributed", lambda topology: torch.device("cpu"))
    monkeypatch.setattr(Watchdog, "start", lambda watchdog, topology: None)  # no ranks, no store
    monkeypatch.setattr(assemble, "_engine", accept)
    monkeypatch.setattr("pipeline.launching.subprocess", SimpleNamespace(Popen=accept))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which makes a GPU of any host
    monkeypatch.chdir(ROOT)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(command: str, arguments: list[str]) -> tuple[int, str]:
        here = {**places, "<tmp>": str(tmp_path)}
        main = importlib.import_module(MODULES[command]).main
        statuses: list[int] = []

        def leave(status: int) -> NoReturn:
            statuses.append(status)
            raise SystemExit(status)

        with pytest.raises(SystemExit) as end:
            run_command(lambda: main([filled(a, here) for a in arguments]), leave=leave)
        return int(end.value.code or 0), capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def cases() -> Iterator[Any]:
    good, output = "--config=<files>/good.yaml", "--output_dir=<tmp>/run"
    every: list[tuple[str, Case]] = []
    for name, (_, words) in RECIPES.items():
        every.append((f"recipe {name}", Case("train", [f"--config=<files>/{name}.yaml"], words)))
    for name, (_, words) in DS_CONFIGS.items():
        arguments = [good, output, f"--deepspeed=<files>/{name}.json"]
        every.append((f"ds {name}", Case("train", arguments, words)))
    for override, words in OVERRIDES:
        every.append((override, Case("train", [good, output, override], words)))
    prep = [
        f"--prep.input=[{TEXT}/en.jsonl, {TEXT}/sw.jsonl]",
        "--prep.output_dir=<tmp>/shards",
        "--prep.tokenizer=<teacher>",
        "--prep.seq_len=64",
    ]
    for override, words in PREPARATIONS:
        every.append((f"prep {override}", Case("build_shards", [*prep, override], words)))
    every += [
        (f"chain {name}", Case("chain", [f"<tmp>/{name}.yaml"], words))
        for name, (_, words) in CHAINS.items()
    ]
    every += [(" ".join([case.command, *case.arguments]), case) for case in COMMANDS]
    return (pytest.param(case, id=name) for name, case in every)


@pytest.mark.parametrize("case", cases())
def test_bad_input_is_refused_in_one_line(
    case: Case,
    end_of: Callable[[str, list[str]], tuple[int, str]],
    places: dict[str, str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    here = {**places, "<tmp>": str(tmp_path)}
    if case.command == "chain" and case.arguments and case.arguments[0].startswith("<tmp>/"):
        name = Path(case.arguments[0]).stem
        write(tmp_path / f"{name}.yaml", filled(CHAINS[name][0], here))
    if "<run>" in " ".join(case.arguments):
        here["<run>"] = places["<run>"] = str(request.getfixturevalue("straight")("zero2", 1))
    status, said = end_of(case.command, case.arguments)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert not (Path(places["<files>"]) / "executed").exists(), "a model's own code was run"
    missing = [word for word in case.words if filled(word, here) not in "".join(errors)]
    if status != case.status or len(errors) != 1 or "Traceback" in said or missing:
        pytest.fail(f"status {status}, without {missing}: ...{said[-600:]}", pytrace=False)
