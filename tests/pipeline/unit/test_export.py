from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from data_prep.command import ConfigError, RunError
from data_prep.shards import ShardReader
from pipeline import export
from pipeline.checkpoint import Checkpoints, State
from pipeline.config import Recipe, plain
from pipeline.export import export_student, main, save_start
from pipeline.models import (
    CutEncoder,
    build_student,
    load_tokenizer,
    own_weights,
    pack_encoder,
    read_config,
    student_config,
)
from pipeline.objectives import build_objective
from pipeline.topology import Topology

METRICS = [
    {"step": 1, "loss": 3.25},
    {"step": 1, "heldout_loss": 3.5, "heldout_loss_de": 3.0, "heldout_loss_sw": 4.0},
    {"step": 2, "loss": 1.75},
    {"step": 2, "heldout_loss": 1.5, "heldout_loss_de": 1.125, "heldout_loss_sw": 1.875},
    {"step": 3, "loss": 0.5},
]


def state_at(step: int) -> State:
    content = {"data.shards (content)": "0123456789abcdef" * 4}
    return State(step=step, tokens=step * 1000, world_size=1, identity=content)


class Run:
    """A run's folder, as training leaves it, and the student that it trained."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        teacher_config = read_config("teacher.model", recipe.teacher.model)
        config = student_config(recipe.student, teacher_config)
        objective = build_objective(recipe, teacher_config, config)
        model = build_student(recipe.student, config, 1, objective.needs)
        self.start = {name: tensor.clone() for name, tensor in own_weights(model).items()}
        trained = pack_encoder(model, objective.needs, objective.projections).named_weights()
        self.untrained = {n: t for n, t in self.start.items() if n not in trained}
        generator = torch.Generator().manual_seed(2)
        self.trained = {
            name: torch.randn(weight.shape, generator=generator) for name, weight in trained.items()
        }
        folder.mkdir()
        save_start(config, load_tokenizer(recipe.tokenizer), self.untrained, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(plain(recipe)))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in METRICS))

    @property
    def whole(self) -> dict[str, torch.Tensor]:
        return {**self.untrained, **self.trained}


OBJECTIVES: dict[str, dict[str, Any]] = {
    "minilmv2": {},
    "values": {"relations": {"vv": 1.0}},
    "hidden": {"relations": {"vv": 1.0, "hh": 1.0}},
    "distilbert": {"name": "distilbert", "losses": {"ce": 5.0, "mlm": 2.0}},
}


@pytest.fixture
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    objective = OBJECTIVES[getattr(request, "param", "minilmv2")]
    run = Run(tmp_path / "run", make_recipe(output_dir="runs/my-student", objective=objective))

    def read(folder: Path, tag: str, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        assert folder == run.folder / "checkpoints"
        run.tag = tag
        assert shapes == {name: weight.shape for name, weight in run.trained.items()}
        return {name: run.trained[name].clone() for name in shapes}

    monkeypatch.setattr(export, "read_weights", read)
    return run


def assert_loads_as(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """Plain transformers finds exactly these weights there, and misses none."""
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    return model


def test_the_student_is_an_ordinary_model(run: Run, pocket_teacher: Path) -> None:
    folder = export_student(run.recipe, run.folder, state_at(2))
    assert folder == run.folder / "student"
    assert run.tag == "step-00000002"
    model = assert_loads_as(folder, run.whole)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    text = "Ein Satz, dann noch einer."
    ours, teachers = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(pocket_teacher))
    assert ours(text)["input_ids"] == teachers(text)["input_ids"]
    model(**ours(text, return_tensors="pt"))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert "packed" not in json.dumps(config)
    assert not list(folder.glob("untrained*"))


LAST = "encoder.layer.1."
AFTER_QKV = {f"{LAST}attention.output", f"{LAST}intermediate", f"{LAST}output"}
QUERY_AND_KEY = {f"{LAST}attention.self.query", f"{LAST}attention.self.key"}


@pytest.mark.parametrize(
    ("run", "beyond"),
    [
        ("minilmv2", AFTER_QKV | {"pooler"}),
        ("values", AFTER_QKV | QUERY_AND_KEY | {"pooler"}),
        ("hidden", {"pooler"}),
        ("distilbert", set()),
    ],
    indirect=["run"],
)
def test_what_each_objective_leaves_untrained(run: Run, beyond: set[str]) -> None:
    untrained = {name for name in run.start if name.startswith(tuple(beyond))}
    assert run.untrained.keys() == untrained
    folder = export_student(run.recipe, run.folder, state_at(2))
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == run.whole.keys()
    assert all(torch.equal(weights[name], run.whole[name]) for name in weights)
    card = (folder / "README.md").read_text()
    assert ("never trained" in card) is bool(untrained)
    assert ("as it stands" in card) is bool(AFTER_QKV & beyond)
    assert ("relation heads" in card) is (run.recipe.objective.name == "minilmv2")
    assert str(run.recipe.objective.weights) in card


@pytest.mark.parametrize("run", ["distilbert"], indirect=True)
def test_a_student_that_predicts_loads_with_its_head_and_without(run: Run) -> None:
    folder = export_student(run.recipe, run.folder, state_at(2))
    model, loading = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in run.trained.items())
    words = run.trained["roberta.embeddings.word_embeddings.weight"]
    assert torch.equal(state["lm_head.decoder.weight"], words)
    plain_encoder, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in loading["missing_keys"]} <= {"pooler"}
    ids = torch.tensor([[0, 100, 200, 300, 2]])
    with torch.no_grad():
        whole = model.eval()(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(plain_encoder.eval()(ids).last_hidden_state, whole)


def test_the_student_computes_what_was_trained(run: Run) -> None:
    """The exported model's layers, plainly run, are those of the cut encoder with its weights."""
    folder = export_student(run.recipe, run.folder, state_at(2))
    plain_model = AutoModel.from_pretrained(folder).eval()
    cut = CutEncoder(AutoModel.from_pretrained(folder, attn_implementation="packed_segments"))
    ids = torch.tensor([[0, 100, 200, 300, 2]])
    with torch.no_grad():
        states = plain_model(ids, output_hidden_states=True).hidden_states
        expected = plain_model.encoder.layer[1].attention.self.query(states[1])[0]
        ours = cut.eval()(ids, torch.arange(5)[None], torch.tensor([0, 5]), 5)
    torch.testing.assert_close(ours.q, expected, rtol=1e-5, atol=1e-5)


def test_what_was_never_trained_is_as_it_was_initialised(run: Run) -> None:
    folder = export_student(run.recipe, run.folder, state_at(2))
    weights = load_file(folder / "model.safetensors")
    last = "encoder.layer.1.output.dense.weight"
    assert last in run.untrained
    assert torch.equal(weights[last], run.start[last])


def test_the_model_card_tells_the_truth(run: Run) -> None:
    card = (export_student(run.recipe, run.folder, state_at(2)) / "README.md").read_text()
    assert card.startswith("---\n")
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["de", "sw"]
    assert "# my-student" in card
    assert str(run.recipe.teacher.model) in card
    num_parameters = sum(weight.numel() for weight in run.whole.values())
    assert f"{num_parameters:,}" in card
    assert f"{16000 * 16:,} word embeddings" in card
    assert "2 of 10 steps of 8 rows, 2,000 tokens" in card
    assert "3.2500 at step 1, 1.7500 at step 2" in card  # step 3 is after this checkpoint
    assert "1.5000 at step 2" in card
    assert "| de | 1.1250 |" in card
    assert "0.5000" not in card
    for name in run.untrained:
        assert f"- `{name}`" in card
    for name in run.trained:
        assert f"`{name}`" not in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0]) == plain(run.recipe)


def test_the_card_names_the_teacher_s_licence(run: Run) -> None:
    card = (export_student(run.recipe, run.folder, state_at(2)) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"  # as models/pocket-teacher/README.md has it
    assert "base_model" not in front  # a folder is no name on a hub
    assert "| licence | apache-2.0, the teacher's |" in card
    assert "Texts are cut at 512 tokens" in card


def test_formats_of_a_run_are_measured_by_what_it_was_trained_by(
    make_recipe: Callable[..., Recipe], shards: Path, tmp_path: Path, monkeypatch
) -> None:
    recipe = make_recipe(output_dir="runs/mine", data={"shards": str(shards)})
    run = Run(tmp_path / "run", recipe)
    monkeypatch.setattr(export, "read_weights", lambda folder, tag, shapes: run.trained)
    state = dataclasses.replace(
        state_at(2), identity={"data.shards (content)": ShardReader(str(shards)).digest}
    )
    folder = export_student(recipe, run.folder, state, formats=["onnx-int8"])
    facts = json.loads((folder / "formats.json").read_text())
    assert facts["text"] == f"6 held-out rows of `{shards}`"
    assert facts["formats"].keys() == {"onnx-int8"}
    assert not (folder / "onnx" / "model.onnx").exists()
    difference = facts["formats"]["onnx-int8"]["difference"]
    loss, of_pytorch = difference["heldout_loss"], difference["heldout_loss_pytorch"]
    assert loss == pytest.approx(of_pytorch, rel=0.05)
    assert loss != of_pytorch
    card = (folder / "README.md").read_text()
    assert f"| {loss:.4f} ({of_pytorch:.4f}) |" in card
    assert card.index("## Formats") < card.index("## Recipe")
    assert_loads_as(folder, run.whole)


def test_a_run_without_held_out_losses_has_a_card_too(run: Run) -> None:
    (run.folder / "metrics.jsonl").unlink()
    card = (export_student(run.recipe, run.folder, state_at(2)) / "README.md").read_text()
    assert "held-out" not in card
    assert "language" not in yaml.safe_load(card.split("---")[1])


def test_an_older_student_is_replaced_whole(run: Run) -> None:
    export_student(run.recipe, run.folder, state_at(1))
    (run.folder / "student" / "old.txt").write_text("of the old one")
    run.trained["embeddings.LayerNorm.bias"] += 1
    folder = export_student(run.recipe, run.folder, state_at(2))
    assert_loads_as(folder, run.whole)
    assert not (folder / "old.txt").exists()
    assert not (run.folder / ".student.partial").exists()


def test_a_failed_export_leaves_the_older_student(run: Run, monkeypatch) -> None:
    before = run.whole
    folder = export_student(run.recipe, run.folder, state_at(1))

    def fail(*arguments: Any) -> None:
        raise RunError("damaged")

    monkeypatch.setattr(export, "read_weights", fail)
    with pytest.raises(RunError):
        export_student(run.recipe, run.folder, state_at(2))
    assert_loads_as(folder, before)


def test_the_start_is_replaced_whole(run: Run, make_recipe: Callable[..., Recipe]) -> None:
    config = student_config(run.recipe.student, read_config("x", run.recipe.teacher.model))
    tokenizer = load_tokenizer(run.recipe.tokenizer)
    (run.folder / "student-start" / "old.txt").write_text("old")
    save_start(config, tokenizer, {"weight": torch.ones(2)}, run.folder)
    start = run.folder / "student-start"
    assert not (start / "old.txt").exists()
    assert load_file(start / "untrained.safetensors")["weight"].tolist() == [1, 1]
    assert sorted(p.name for p in run.folder.iterdir() if p.name.startswith(".")) == []


# The command


class FakeEngine:
    def snapshot(self, tag: str) -> dict[str, memoryview]:
        return {"model.pt": memoryview(b"weights")}


@pytest.fixture
def checkpoints(run: Run, one_rank: Topology) -> Path:
    """The run's checkpoints, at steps 1 and 2."""
    made = Checkpoints(run.folder, one_rank, keep=5)
    for step in (1, 2):
        made.save(FakeEngine(), state_at(step))
    made.finish()
    return made.folder


def test_the_newest_checkpoint_is_exported_wherever_the_run_lies(
    run: Run, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(run.folder)]) == 0
    assert run.tag == "step-00000002"
    assert capsys.readouterr().out.strip() == str(run.folder / "student")
    assert_loads_as(run.folder / "student", run.whole)


def test_a_checkpoint_may_be_named(run: Run, checkpoints: Path) -> None:
    assert main(["--run", str(run.folder), "--checkpoint", "step-00000001"]) == 0
    assert run.tag == "step-00000001"


def test_a_damaged_checkpoint_is_not_exported(
    run: Run, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints / "step-00000002" / "model.pt").write_bytes(b"Weights")
    with pytest.raises(RunError, match=r"step-00000002 is damaged: model\.pt"):
        main(["--run", str(run.folder), "--checkpoint", "step-00000002"])
    assert main(["--run", str(run.folder)]) == 0
    assert run.tag == "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_what_is_not_there_is_refused_by_name(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--run {tmp_path} has no config\.yaml"):
        main(["--run", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"step-9 is not one of step-00000001, step-00000002"):
        main(["--run", str(run.folder), "--checkpoint", "step-9"])


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--run", "r", "--formats", "hf,tflite"], "--formats tflite is not one of hf, onnx"),
        (["--model", "m"], "--model m needs --output_dir"),
        (["--model", "m", "--output_dir", "o", "--checkpoint", "c"], "--checkpoint is for --run"),
        (["--run", "r", "--private"], "--private is for --push_to_hub"),
        (["--run", "r", "--model", "m"], "not allowed with argument"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: list[str], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        main(options)


def test_a_folder_that_is_no_export_is_never_replaced(
    run: Run, checkpoints: Path, pocket_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text("{}")
    for source in (["--run", str(run.folder)], ["--model", str(pocket_teacher)]):
        with pytest.raises(ConfigError, match="home holds something that is no export"):
            main([*source, "--output_dir", str(tmp_path / "home")])
    assert (tmp_path / "home" / "config.json").read_text() == "{}"
    for _ in range(2):  # anew, and over an export
        assert main(["--run", str(run.folder), "--output_dir", str(tmp_path / "mine")]) == 0
    with pytest.raises(ConfigError, match="is the model's own folder"):
        main(["--model", str(tmp_path / "mine"), "--output_dir", str(tmp_path / "mine")])
    assert_loads_as(tmp_path / "mine", run.whole)
    assert not (run.folder / "student").exists()


def test_a_run_without_a_checkpoint_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        main(["--run", str(run.folder)])
