"""A chain of two stages through real launchers, and what it refuses before it starts one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.command import ConfigError
from pipeline.chain import Chain, Stage, check_chain, main, read_chain, stage_arguments
from pipeline.config import load_recipe
from tests.pipeline.launch import ROOT, environment, free_port, has_step, metrics, wait_for


def write_chain(folder: Path, recipe: Path, **second: object) -> Path:
    chain = {
        "output_dir": str(folder / "chain"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "launcher": f"deepspeed --num_accelerators 1 --master_port {free_port()}",
        "stages": [
            {"name": "assistant", "config": str(recipe), "set": {"student.num_hidden_layers": 3}},
            {"name": "student", "config": str(recipe), "set": second},
        ],
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(chain))
    return path


def begin(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.chain", str(path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_stages_follow_each_other_and_resume(tiny: list[str], tmp_path: Path) -> None:
    path = write_chain(tmp_path, Path(tiny[1]), **{"train.max_steps": 40})
    chain = begin(path)
    wait_for(has_step(tmp_path / "chain" / "student", 3))
    chain.send_signal(signal.SIGTERM)
    output, _ = chain.communicate(timeout=120)
    assert chain.returncode == 85, output
    stopped_at = metrics(tmp_path / "chain" / "student")[-1]["step"]
    assert 3 <= stopped_at < 40

    chain = begin(path)
    output, _ = chain.communicate(timeout=120)
    assert chain.returncode == 0, output
    assert "[1/2] assistant: complete, skipped" in output
    steps = [line["step"] for line in metrics(tmp_path / "chain" / "student") if "loss" in line]
    assert steps == list(range(1, 41))
    configs = {
        name: yaml.safe_load((tmp_path / "chain" / name / "config.yaml").read_text())
        for name in ("assistant", "student")
    }
    assistant = tmp_path / "chain" / "assistant" / "student"
    assert configs["student"]["teacher"]["model"] == str(assistant)
    assert configs["assistant"]["student"]["num_hidden_layers"] == 3
    assert json.loads((assistant / "config.json").read_text())["num_hidden_layers"] == 3

    chain = begin(path)
    output, _ = chain.communicate(timeout=60)
    assert chain.returncode == 0
    assert output.count("complete, skipped") == 2


def test_a_typo_in_the_last_stage_is_found_before_the_first_starts(
    tiny: list[str], tmp_path: Path
) -> None:
    path = write_chain(tmp_path, Path(tiny[1]), **{"train.max_stepz": 40})
    with pytest.raises(ConfigError, match=r"max_stepz.*did you mean 'train.max_steps'"):
        main([str(path)])
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([Stage(name="a/b", config="r")], "'a/b'.*no folder"),
        ([Stage(name="a", config="r"), Stage(name="a", config="r")], "'a' twice"),
        ([Stage(name="a", config="r", set={"output_dir": "x"})], "sets output_dir"),
        (
            [Stage(name="a", config="r"), Stage(name="b", config="r", set={"teacher.model": "x"})],
            "'b' sets teacher.model",
        ),
    ],
)
def test_refusals(stages: list[Stage], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_chain(Chain(output_dir="runs/x", stages=stages))


def test_the_first_stage_may_choose_its_teacher() -> None:
    first = Stage(
        name="a", config="r.yaml", set={"teacher.model": "x", "objective.relations": {"qq": 1}}
    )
    chain = Chain(output_dir="out", stages=[first, Stage(name="b", config="r.yaml")])
    check_chain(chain)
    assert "--teacher.model=x" in stage_arguments(chain, 0)
    assert '--objective.relations={"qq": 1}' in stage_arguments(chain, 0)
    assert stage_arguments(chain, 1)[-1] == "--teacher.model=out/a/student"


def test_the_stages_of_the_repositorys_chain_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chain = read_chain(["recipes/chain.yaml"])
    check_chain(chain)
    recipes = [load_recipe(stage_arguments(chain, number))[0] for number in (0, 1)]
    assert recipes[0].student.num_hidden_layers > recipes[1].student.num_hidden_layers
    assert recipes[1].teacher.model == f"{recipes[0].output_dir}/student"
