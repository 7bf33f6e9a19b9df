from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from data_prep.command import ConfigError
from pipeline.config import Recipe
from pipeline.float8 import FLOAT8, Float8Linear, quantize, to_float8
from pipeline.models import load_teacher


def test_rows_come_back_to_the_formats_precision() -> None:
    rows = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    rows[7] = 0
    eights, scales = quantize(rows)
    assert eights.dtype == FLOAT8
    error = (eights.float() * scales - rows).abs()
    assert (error <= rows.abs() * 2**-4 + rows.abs().amax(1, keepdim=True) * 2**-9).all()
    assert torch.equal(eights[7].float(), torch.zeros(64))


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_factors(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias).bfloat16()
    x = torch.randn(1, 37, 96).bfloat16()
    with torch.inference_mode():
        ours = Float8Linear(linear)(x).double()
        (x8, sx), (w8, sw) = quantize(x[0]), quantize(linear.weight)
        exact = (x8.double() * sx) @ (w8.double() * sw).T + (linear.bias.double() if bias else 0)
        plain = linear.double()(x.double())
    assert ours.shape == (1, 37, 48)
    assert (ours[0] - exact).abs().max() <= 2**-7 * float(exact.abs().max())
    assert 0 < (ours - plain).norm() / plain.norm() < 0.06


def test_only_widths_that_the_kernels_take_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(nn.Linear(32, 24))).bfloat16()
    to_float8(model)
    assert isinstance(model[0], Float8Linear)
    assert isinstance(model[1][0], nn.Linear)


def test_the_teachers_last_products_stay_in_bf16(make_recipe: Callable[..., Recipe]) -> None:
    encoder = load_teacher(make_recipe(teacher={"dtype": "float8"}), torch.device("cpu"))._encoder
    *layers, last = encoder.model.encoder.layer
    assert all(isinstance(layer.attention.self.query, Float8Linear) for layer in layers)
    assert last.attention.self.query.weight.dtype == torch.bfloat16


def test_an_older_gpu_is_refused(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an older one")
    with pytest.raises(ConfigError, match=r"teacher.dtype=float8 .* 9\.0 .*an older one.*bfloat16"):
        load_teacher(make_recipe(teacher={"dtype": "float8"}), torch.device("cuda"))
