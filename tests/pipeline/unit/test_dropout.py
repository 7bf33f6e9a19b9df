from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.dropout import Dropout, dropout_mask, replace_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_share_and_the_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = dropout_mask(torch.empty(500, 401, dtype=dtype), p)
    assert mask.dtype == dtype
    kept = mask > 0
    spread = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float((~kept).double().mean()) - p) < 5 * spread
    for lane in range(4):  # four decisions share a random word
        share = float((~kept).flatten()[lane::4].double().mean())
        assert abs(share - p) < 10 * spread
    torch.testing.assert_close(
        mask[kept].float().unique(), torch.tensor([1 / (1 - p)]), rtol=2**-8, atol=0
    )


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout_mask(torch.empty(1 << 18), 0.5) > 0).float()
    for distance in range(1, 9):
        together = float((kept[:-distance] * kept[distance:]).mean())
        assert abs(together - 0.25) < 5 * 0.5 / 512


def test_it_follows_the_seed_and_the_mode() -> None:
    dropout, x = Dropout(0.5), torch.ones(1000)
    torch.manual_seed(0)
    first = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, dropout(x))
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(1000, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert torch.equal(x.grad * x.detach(), out.detach())


def test_all_dropouts_below_a_module_are_replaced() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2)))
    replace_dropout(model)
    assert [m.p for m in model.modules() if isinstance(m, Dropout)] == [0.1, 0.2]
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout)]
