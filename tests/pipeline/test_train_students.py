"""Several students from one pass of the teacher are those that train alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from data_prep.command import ConfigError
from pipeline.config import load_recipes
from tests.pipeline.launch import fork, has_step, metrics, run, wait_for

STUDENTS = [
    {"name": "first", "set": {}},
    {
        "name": "small",
        "set": {
            "student.num_hidden_layers": 1,
            "teacher.layer": 2,
            "objective.relations": {"qk": 1.0, "hh": 0.5},
            "train.learning_rate": 3e-3,
        },
    },
    {"name": "v1", "set": {"objective.name": "minilm", "student.num_attention_heads": 4}},
]


def write_students(tiny: list[str], folder: Path, students: list[dict]) -> list[str]:
    recipe = yaml.safe_load(Path(tiny[1]).read_text())
    folder.mkdir(exist_ok=True)
    path = folder / "students.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder), "students": students}))
    return ["--config", str(path)]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_students_are_those_that_train_alone(stage: str, tiny: list[str], tmp_path: Path) -> None:
    together = write_students(tiny, tmp_path / "together", STUDENTS)
    with fork(together, stage=stage) as running:
        wait_for(has_step(tmp_path / "together" / "v1", 6))
        running.kill_everything()
    outcome = run(together, stage=stage, begin=fork)
    assert outcome.status == 0, outcome.output
    for student in STUDENTS:
        ours = tmp_path / "together" / student["name"]
        # What it left is an ordinary run's configuration: the same, alone.
        alone = tmp_path / "alone" / student["name"]
        arguments = ["--config", str(ours / "config.yaml"), f"--output_dir={alone}"]
        assert run(arguments, stage=stage, begin=fork).status == 0
        assert weights(ours) == weights(alone), student["name"]
        assert metrics(ours) == metrics(alone)
    again = run(together, stage=stage, begin=fork)
    assert again.status == 0
    assert again.output.count("nothing left to do") == len(STUDENTS)


def test_a_student_that_is_behind_catches_up(tiny: list[str], tmp_path: Path) -> None:
    """As after a kill between two students' checkpoints."""
    both = write_students(tiny, tmp_path / "both", STUDENTS[:2])
    assert run(both, begin=fork).status == 0
    whole = weights(tmp_path / "both" / "small")
    checkpoints = tmp_path / "both" / "small" / "checkpoints"
    steps = sorted(checkpoints.glob("step-*"))
    (steps[-1] / "COMPLETE").unlink()
    untouched = (tmp_path / "both" / "first" / "metrics.jsonl").read_text()
    outcome = run(both, begin=fork)
    assert outcome.status == 0, outcome.output
    assert weights(tmp_path / "both" / "small") == whole
    assert (tmp_path / "both" / "first" / "metrics.jsonl").read_text() == untouched
    assert [line["step"] for line in metrics(tmp_path / "both" / "small") if "loss" in line] == [
        *range(1, 13)
    ]


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ([{"name": "a"}, {"name": "a"}], "'a' twice"),
        ([{"name": "a/b"}], r"'a/b'.*no folder"),
        ([{"name": "a", "set": {"train.max_steps": 3}}], r"'a' sets train\.max_steps.*in common"),
        ([{"name": "a", "set": {"seed": 3}}], "'a' sets seed"),
        ([{"name": "a", "set": {"student.hiden_size": 3}}], "hidden_size"),
        (
            [{"name": "a"}, {"name": "b", "set": {"objective.name": "distilbert"}}],
            "mask the text",
        ),
    ],
)
def test_refusals(students: list[dict], message: str, tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipes(write_students(tiny, tmp_path / "x", students))


def test_a_float8_teacher_has_one_layer(tiny: list[str], tmp_path: Path) -> None:
    students = [{"name": "a"}, {"name": "b", "set": {"teacher.layer": 1}}]
    arguments = [*write_students(tiny, tmp_path / "x", students), "--teacher.dtype=float8"]
    with pytest.raises(ConfigError, match="float8"):
        load_recipes(arguments)


def test_the_command_line_reaches_every_student(tiny: list[str], tmp_path: Path) -> None:
    arguments = write_students(tiny, tmp_path / "x", STUDENTS)
    recipes, _ = load_recipes([*arguments, "--train.max_steps=7"])
    assert [recipe.train.max_steps for recipe in recipes] == [7, 7, 7]
    assert [recipe.output_dir for recipe in recipes] == [
        str(tmp_path / "x" / str(student["name"])) for student in STUDENTS
    ]
    assert recipes[1].objective.weights == {"hh": 0.5, "qk": 1.0}
    assert json.dumps(recipes[0].objective.weights) == '{"kk": 1.0, "qq": 1.0, "vv": 1.0}'
