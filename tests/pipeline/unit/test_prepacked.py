from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.prepacked import PrepackedLinear, PrepackedOutput, can_prepack, prepack

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("tokens", [1, 59, 2048, 3000])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_torchs_to_the_bit(tokens: int, bias: bool) -> None:
    linear = nn.Linear(96, 48, bias=bias).bfloat16()
    x = torch.randn(1, tokens, 96).bfloat16()
    with torch.inference_mode():
        assert torch.equal(PrepackedLinear(linear)(x), linear(x))


def test_a_gelu_is_applied_before_the_sum_is_rounded() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48).bfloat16()
    x = torch.randn(500, 96).bfloat16()
    with torch.inference_mode():
        ours = PrepackedLinear(linear, "gelu")(x).double()
        exact = nn.functional.gelu(linear.double()(x.double()))
        apart = nn.functional.gelu(linear.bfloat16()(x)).double()
    error, error_apart = ((y - exact).abs().max() for y in (ours, apart))
    assert error <= 2**-8 * float(exact.abs().max())
    assert (ours - exact).abs().mean() < (apart - exact).abs().mean()
    assert error_apart > 0


def test_all_linear_layers_below_a_module_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))).bfloat16()
    assert can_prepack(model)
    assert not can_prepack(nn.Linear(2, 2))  # fp32 has nothing to gain
    prepack(model)
    assert len([m for m in model.modules() if isinstance(m, PrepackedLinear)]) == 2
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]


def test_an_output_adds_the_residual_before_it_rounds() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(96, 48).bfloat16(), nn.LayerNorm(48).bfloat16()
    x, residual = torch.randn(1, 500, 96).bfloat16(), torch.randn(1, 500, 48).bfloat16()
    with torch.inference_mode():
        ours = PrepackedOutput(linear, norm)(x, residual).double()
        apart = norm(linear(x) + residual).double()
        exact = norm.double()(linear.double()(x.double()) + residual.double())
    assert (ours - exact).abs().max() <= 2**-7 * float(exact.abs().max())
    assert (ours - exact).abs().mean() < (apart - exact).abs().mean()
