"""Batches of one shape, and layers that are compiled once for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from data_prep.command import ConfigError
from pipeline.config import Recipe
from pipeline.engine import merge_ds_config
from pipeline.loader import Batch, Masked
from pipeline.models import MaskedLM, Target, load_teacher
from pipeline.objectives import QKV, Outputs, Predictions

CPU = torch.device("cpu")


def make_batch(*lengths: int, shape: int | None = None, masked: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(5, 40, (1, sum(lengths)), generator=generator)
    places = torch.tensor([0, sum(lengths) - 1])
    return Batch(
        input_ids=ids,
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=8,
        first_position=0,
        row_ids=(0,),
        masked=Masked(places, ids[0, places]) if masked else None,
        shape=shape,
    )


@pytest.mark.parametrize("missing", [0, 1, 8, 9, 21])
def test_a_batch_is_filled_up_with_segments_of_its_own(missing: int) -> None:
    batch = make_batch(5, 8, 3, shape=16 + missing)
    ids, positions, cu_seqlens, max_seqlen = batch.inputs
    assert ids.shape == positions.shape == (1, 16 + missing)
    assert torch.equal(ids[:, :16], batch.input_ids)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[:4].tolist() == [0, 5, 13, 16]
    assert cu_seqlens[-1] == 16 + missing
    lengths = cu_seqlens.diff().tolist()
    assert all(0 < length <= max_seqlen for length in lengths)
    assert positions[0].tolist() == [place for n in lengths for place in range(n)]
    assert batch.num_tokens == 16


@pytest.mark.parametrize("needs", [QKV, Outputs, Predictions])
def test_what_is_filled_up_changes_nothing(
    needs: Any, tiny_models: dict[str, Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    AutoModelForMaskedLM.from_pretrained(tiny_models["roberta"]).save_pretrained(tmp_path)
    recipe = make_recipe(teacher={"model": str(tmp_path), "dtype": "float32"})
    teacher = load_teacher(recipe, CPU, [Target(needs, 3)])
    batch = make_batch(5, 8, 3, masked=needs is Predictions)
    plain, filled = teacher(batch), teacher(dataclasses.replace(batch, shape=29))
    flat = (lambda outputs: outputs) if needs is not Outputs else (lambda o: [o.hidden, *o.qkv])
    for one, other in zip(flat(plain), flat(filled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.shape == other.shape


def test_layers_are_compiled_once_for_all_batches(
    tiny_models: dict[str, Path], make_recipe: Callable[..., Recipe], monkeypatch
) -> None:
    recipe = make_recipe(teacher={"model": str(tiny_models["bert"]), "dtype": "float32"})
    expected = load_teacher(recipe, CPU)
    teacher, counter = load_teacher(recipe, CPU), CompileCounter()
    torch._dynamo.reset()
    layers = teacher._encoder.layers
    for layer in layers[:-1]:
        layer.compile(backend=counter)
    batches = [make_batch(*lengths, shape=32) for lengths in ((5, 8), (3,) * 7, (8, 8, 8, 8))]
    for batch in batches[:2]:
        teacher(batch)
    compiled = counter.frame_count
    assert compiled > 0
    for batch in [*batches, make_batch(*[2] * 13, shape=32)]:
        for one, other in zip(teacher(batch), expected(batch), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == compiled


def test_the_recipe_compiles_whole_layers_alone(
    tiny_models: dict[str, Path], make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(teacher={"model": str(tiny_models["bert"])}, train={"compile": True})
    *whole, cut = load_teacher(recipe, CPU)._encoder.layers
    assert all(layer._compiled_call_impl is not None for layer in whole)
    assert cut._compiled_call_impl is None
    assert MaskedLM.compile_layers is load_teacher(recipe, CPU)._encoder.compile_layers.__func__


def test_stage_3_is_refused(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"compile": True})
    with pytest.raises(ConfigError, match=r"train\.compile=true and ZeRO stage 3"):
        merge_ds_config({"zero_optimization": {"stage": 3}}, recipe, 1)
