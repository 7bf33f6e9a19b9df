"""Layers between the student's matrix products, against torch's own operations in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers import BertConfig, BertModel

from pipeline.fused_layers import Linear, Output, ResidualNorm, _library, fuse

needs_kernel = pytest.mark.skipif(_library() is None, reason="there is no C compiler")
ROUNDING = 2.0**-8  # of bf16, relative


def make_norm(width: int, p: float = 0.0) -> ResidualNorm:
    norm = nn.LayerNorm(width, eps=1e-5)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    return ResidualNorm(norm.bfloat16(), p)


def random_bf16(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).bfloat16().requires_grad_()


def gradients_in_float64(
    norm: ResidualNorm, x: torch.Tensor, residual: torch.Tensor, mask: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [t.detach().double().requires_grad_() for t in (x, residual, norm.weight, norm.bias)]
    total = leaves[1] + leaves[0] * mask.double()
    # What is normalised is the sum rounded to bf16; its gradient goes through unrounded.
    total = total + (total.detach().bfloat16().double() - total.detach())
    out = layer_norm(total, x.shape[-1:], leaves[2], leaves[3], norm.eps)
    return out, list(torch.autograd.grad(out, leaves, g.double()))


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 63, 48), (1, 65, 384), (2, 64, 32), (130, 768)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_kernel_equals_float64(shape, offset):
    torch.manual_seed(0)
    norm = make_norm(shape[-1]).train()
    x, residual = random_bf16(*shape, scale=3), random_bf16(*shape)
    with torch.no_grad():
        residual += offset  # a mean far from 0, which a careless variance loses digits to
    g = torch.randn(shape).bfloat16()
    out = norm(x, residual)
    found = torch.autograd.grad(out, [x, residual, norm.weight, norm.bias], g)
    expected, gradients = gradients_in_float64(norm, x, residual, torch.ones(shape), g)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING, atol=1e-3)
    for ours, theirs in zip(found, gradients, strict=True):
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=ROUNDING, atol=2e-3 * largest)


@needs_kernel
def test_a_row_without_variance_is_the_bias():
    norm = make_norm(32).train()
    x = torch.full((1, 3, 32), 2.0).bfloat16().requires_grad_()
    out = norm(x, torch.ones_like(x))
    assert torch.equal(out, norm.bias.expand_as(out))
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert gradient.isfinite().all()


@needs_kernel
def test_dropout_has_its_rate_and_the_same_mask_backward():
    torch.manual_seed(1)
    p, shape = 0.3, (1, 500, 64)
    norm = make_norm(64, p).train()
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    x = torch.full(shape, 4.0).bfloat16().requires_grad_()
    residual = random_bf16(*shape)
    g = torch.randn(shape).bfloat16()
    out = norm(x, residual)
    grad_x, grad_residual = torch.autograd.grad(out, [x, residual], g, retain_graph=True)
    mask = grad_x.double() / grad_residual.double()
    mask = torch.where(mask.abs() > 0.5, 1 / (1 - p), 0.0)
    dropped = float((mask == 0).double().mean())
    assert abs(dropped - p) < 4 * (p * (1 - p) / mask.numel()) ** 0.5
    expected, gradients = gradients_in_float64(norm, x, residual, mask, g)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING, atol=5e-3)
    torch.testing.assert_close(grad_x.double(), gradients[0], rtol=0.02, atol=0.02)
    rows = (mask == 0).double().mean(dim=(0, 2))
    assert rows.std() < 0.1  # neither whole rows nor whole columns are dropped
    assert (mask == 0).double().mean(dim=(0, 1)).std() < 0.05
    assert not torch.equal(out, norm(x, residual))  # another call draws another mask
    torch.manual_seed(7)
    again = norm(x, residual)
    torch.manual_seed(7)
    assert torch.equal(again, norm(x, residual))
    norm.eval()
    assert torch.equal(norm(x, residual), norm(x, residual))


@needs_kernel
def test_threads_change_nothing():
    torch.manual_seed(2)
    norm = make_norm(384, 0.1).train()
    x, residual, g = random_bf16(1, 1000, 384), random_bf16(1, 1000, 384), random_bf16(1, 1000, 384)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        out = norm(x, residual)
        found.append(
            [out, *torch.autograd.grad(out, [x, residual, norm.weight, norm.bias], g.detach())]
        )
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_other_precisions_are_torch():
    torch.manual_seed(4)
    norm, x, residual = make_norm(48).float(), torch.randn(1, 9, 48), torch.randn(1, 9, 48)
    expected = layer_norm(residual + x, (48,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x, residual), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_equals_torchs(dtype):
    torch.manual_seed(5)
    theirs = nn.Linear(48, 80).to(dtype)
    ours = Linear(theirs)
    x, g = torch.randn(1, 70, 48).to(dtype).requires_grad_(), torch.randn(1, 70, 80).to(dtype)
    leaves = [x, theirs.weight, theirs.bias]
    found = torch.autograd.grad(ours(x), leaves, g)
    expected = torch.autograd.grad(theirs(x), leaves, g)
    torch.testing.assert_close(ours(x), theirs(x), rtol=ROUNDING, atol=1e-3)
    for ours_gradient, theirs_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_gradient, theirs_gradient)


def test_fuse_keeps_names_and_outputs():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(6)
    model = BertModel(config).eval()
    ids = torch.randint(0, 50, (1, 20))
    names, expected = model.state_dict().keys(), model(ids).last_hidden_state
    fuse(model)
    assert model.state_dict().keys() == names
    assert sum(isinstance(module, Output) for module in model.modules()) == 4
    assert torch.equal(model(ids).last_hidden_state, expected)
