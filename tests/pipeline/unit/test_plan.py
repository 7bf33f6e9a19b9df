from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from benchmarks.plan_vs_measured import recorded_rows
from data_prep.command import ConfigError
from pipeline import attention, plan
from pipeline.architectures import ARCHITECTURES
from pipeline.attention import PACKED
from pipeline.config import ROOT, load_recipe, read_ds_config
from pipeline.flops import size_of
from pipeline.footprint import Policy, Trained
from pipeline.fused_layers import fuse
from pipeline.models import meta_encoder, pack_encoder
from pipeline.objectives import QKV, Outputs, Predictions, build_objective

SHAPE = {"vocab_size": 200, "num_hidden_layers": 3, "max_position_embeddings": 130}
SHAPE |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "pad_token_id": 0}
LARGE = {"vocab_size": 250_002, "hidden_size": 1024, "num_hidden_layers": 24}
LARGE |= {"num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 514}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XLM-R large as its config.json alone."""
    folder = tmp_path_factory.mktemp("xlmr-large")
    XLMRobertaConfig(**LARGE, type_vocab_size=1).save_pretrained(folder)
    return folder


def command(large: Path, *options: str) -> list[str]:
    recipe = str(ROOT / "recipes" / "xlmr_large_to_l6h384.yaml")
    return [recipe, f"--teacher.model={large}", *options]


@pytest.mark.parametrize(
    ("model_type", "model", "needs"),
    [
        (BertConfig, BertModel, QKV),
        (BertConfig, BertModel, Outputs),
        (BertConfig, BertForMaskedLM, Predictions),
        (ModernBertConfig, ModernBertModel, QKV),
    ],
)
def test_products_are_those_that_torch_counts(model_type: Any, model: Any, needs: Any) -> None:
    config = model_type(**SHAPE, **({"type_vocab_size": 2} if model_type is BertConfig else {}))
    encoder = pack_encoder(model._from_config(config, attn_implementation=PACKED), needs)
    tokens, masked = 24, 6
    ids, positions = torch.ones(1, tokens, dtype=torch.int64), torch.arange(tokens)[None]
    inputs = [ids, positions, torch.tensor([0, tokens], dtype=torch.int32), tokens]
    inputs += [torch.arange(masked)] if needs is Predictions else []
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(*inputs)
    size = size_of(meta_encoder(config, needs))
    share = masked / tokens if size.predicts else 0.0
    assert size.forward_flops([tokens], share) == counter.get_total_flops()
    assert size.layers == (2 if needs is QKV else 3)


@pytest.mark.skipif(attention._library() is None, reason="no compiled kernels for this CPU")
def test_activations_are_what_autograd_keeps(large: Path) -> None:
    recipe, _ = load_recipe(
        [
            *("--config", str(ROOT / "recipes" / "xlmr_large_to_l6h384.yaml")),
            *("--student.hidden_dropout_prob=0", "--student.attention_probs_dropout_prob=0"),
        ]
    )
    config = XLMRobertaConfig(**(LARGE | {"hidden_size": 384, "num_hidden_layers": 3}))
    config.num_attention_heads, config.intermediate_size, config.vocab_size = 12, 1536, 500
    ARCHITECTURES["xlm-roberta"].set_dropout(config, 0.0, 0.0)
    model = XLMRobertaModel._from_config(config, attn_implementation=PACKED)
    student = pack_encoder(model.bfloat16(), QKV)
    size = size_of(student)
    fuse(student)
    tokens, kept = 512, {}
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x  # alive, so that no address comes twice
        return x

    ids, positions = torch.ones(1, tokens, dtype=torch.int64), torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = student(ids, positions, torch.tensor([0, tokens], dtype=torch.int32), tokens)
    measured = sum(nbytes for nbytes, _ in kept.values())
    measured += sum(vectors.nbytes for vectors in outputs)  # what the loss keeps
    policy = Policy.of({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    trained = Trained(
        size=size,
        objective=build_objective(recipe, config, config),
        policy=policy,
        has_dropout=False,
    )
    without_loss = trained.forward(tokens, dataclasses.replace(size, width=0), 2, "cpu")
    loss = tokens * 4 * (384 * 3 + 384)  # three gradients, and the student's vectors in fp32
    assert without_loss - loss == pytest.approx(measured, rel=0.01)


def test_predictions_are_near_what_was_measured() -> None:
    for row in recorded_rows():
        tolerance = 0.06 if row["what"].startswith("MiB") else 0.15
        assert abs(row["ratio"] - 1) <= tolerance, row


def test_a_checkpoint_is_as_large_as_the_demos() -> None:
    recipe, _ = load_recipe([])
    planner = plan.Planner([recipe], read_ds_config(str(ROOT / "ds_configs" / "zero2.json")))
    predicted = planner.plan(2, 8, machines(1e12)).checkpoint_bytes
    assert predicted == pytest.approx(35_871_919, rel=0.01)  # DeepSpeed's three files of 2 ranks


def machines(memory: float) -> plan.Machines:
    options = plan._parser().parse_args(["R.yaml", "--gpu_name", "A100"])
    return dataclasses.replace(plan.gpu_machines(options), memory=memory)


def test_milestones_take_disk_too(large: Path) -> None:
    def disk(*options: str) -> float:
        recipe, _ = load_recipe(["--config", *command(large), *options])
        planner = plan.Planner([recipe], read_ds_config(str(ROOT / "ds_configs" / "zero2.json")))
        found = planner.plan(8, 32, machines(80e9))
        return found.disk_bytes / found.checkpoint_bytes

    assert disk("--train.keep_every=100000") == pytest.approx(disk() + 4)


@pytest.mark.parametrize(
    ("stage", "per_parameter"), [(1, 2 + 4 + 12 / 8), (2, 2 + 12 / 8), (3, (2 + 4 + 12) / 8)]
)
def test_what_is_held_under_each_stage(large: Path, stage: int, per_parameter: float) -> None:
    recipe, _ = load_recipe(["--config", *command(large)])
    planner = plan.Planner([recipe], read_ds_config(str(ROOT / f"ds_configs/zero{stage}.json")))
    (student,) = planner.students
    parameters = student.size.parameters
    cut = 5 * (4 * 384**2 + 2 * 384 * 1536 + 9 * 384 + 1536) + 3 * (384**2 + 384)
    assert parameters == (250_002 + 514 + 1 + 2) * 384 + cut
    buckets = {1: 0, 2: 0, 3: 2 * 2 * 5_000_000}[stage]
    held = sum(student.held(8).values())
    assert held == pytest.approx(per_parameter * parameters + buckets)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(large: Path) -> None:
    recipe, _ = load_recipe(["--config", *command(large)])
    planner = plan.Planner([recipe], read_ds_config(str(ROOT / "ds_configs" / "zero2.json")))
    small = machines(6e9)
    rows = planner.largest_micro_batch(2, small)
    assert sum(planner.memory(rows, 2, "cuda").values()) <= 6e9
    assert 1 < rows < 128  # a rank's rows: all would fit at 80 GB
    assert sum(planner.memory(2 * rows, 2, "cuda").values()) > 6e9
    assert planner.largest_micro_batch(2, machines(80e9)) == 128


def test_json_adds_up(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpu_name=H100", "--gpus", "8", "64", "--price_per_gpu_hour=2", "--json"]
    assert plan.main(command(large, *options)) == 0
    first, second = json.loads(capsys.readouterr().out)["plans"]
    assert (first["ranks"], first["micro_batch_size"], second["micro_batch_size"]) == (8, 32, 4)
    for found in (first, second):
        parts = ("compute_seconds", "optimizer_seconds", "communication_seconds")
        assert found["step_seconds"] == pytest.approx(sum(found[part] for part in parts))
        assert found["memory_bytes"] == pytest.approx(sum(found["memory"].values()))
        assert found["price"] == pytest.approx(2 * found["rank_hours"])
        assert found["kilowatt_hours"] == pytest.approx(0.7 * found["rank_hours"])
        saved = 400 * found["checkpoint_seconds"]
        assert found["days"] * 86_400 == pytest.approx(400_000 * found["step_seconds"] + saved)
    # 560 MFLOP a token: 18 layers of 1024 and 3 x 5 of 384, and their attention over 512 tokens
    linear = 2 * (18 * 12 * 1024**2 + 3 * 1024**2 + 3 * (5 * 12 * 384**2 + 3 * 384**2))
    attention_flops = 4 * 512 * (18 * 1024 + 3 * 5 * 384)
    seconds = 256 * 512 * (linear + attention_flops) / 8 / (0.55 * 0.75 * 989e12)
    assert first["compute_seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu=2GB", "--gpu_name=L4"], r"=1 needs .* has 2.0 GB.*a smaller model"),
        (["--gpu_name=H100", "--gpus", "7"], r"not a multiple of 7 ranks.*use 4 ranks"),
        (["--gpu_name=H1000"], r"'H1000' is not known here; use one of L4"),
        (["--nodes=4"], r"--gpu 80GB, or --gpu_name with one of L4"),
        (["--cpu", "--gpu_name=H100"], r"use one"),
        (["--gpu_name=H100", "--gpus", "8", "--nodes", "1"], r"leave one out"),
    ],
)
def test_refusals_say_what_fits(large: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.main(command(large, *options))


@pytest.mark.parametrize(
    ("options", "rows", "why"),
    [
        (["--gpu=80GB", "--nodes=4"], 8, "x 32 ranks does not divide train.batch_size=256"),
        (["--gpu=5.6GB", "--gpus_per_node=1"], 16, "GB of a rank's 5.6"),
        (["--gpu_name=H100", "--nodes=1"], 32, ""),
    ],
)
def test_what_does_not_fit_is_planned_with_what_does(
    large: Path, options: list[str], rows: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(command(large, *options, "--json")) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["plans"]
    assert found["micro_batch_size"] == rows
    assert why in captured.err
    assert captured.err.endswith(f"--train.micro_batch_size {rows}\n" if why else "")


def test_a_gpu_without_a_name_is_the_slowest_known_with_its_memory() -> None:
    sizes = {24e9: "L4", 25e9: "A100-40GB", 80e9: "A100", 81e9: "H200", 500e9: "B200"}
    assert {memory: plan.slowest_gpu(memory) for memory in sizes} == sizes


def test_cpu_nodes_need_a_network_only_together(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cpu", "--cores=32", "--memory=64GB", "--matmul_tflops=10", "--json"]
    plan.main(command(large, *options))
    (alone,) = json.loads(capsys.readouterr().out)["plans"]
    plan.main(command(large, *options, "--nodes=2"))
    (both,) = json.loads(capsys.readouterr().out)["plans"]
    assert alone["communication_seconds"] == 0 < both["communication_seconds"]
    assert both["compute_seconds"] == pytest.approx(alone["compute_seconds"] / 2)
