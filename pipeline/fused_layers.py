"""The student's layers between its matrix products, in one pass over memory each on a CPU.

In bf16 on a CPU a linear layer takes its bias along with the product, and an encoder's output layer
(dropout, residual sum, layer norm) is one kernel in C, forward and backward. Everywhere else, and
in any other precision, the same modules are torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import nn

from pipeline.dropout import dropout
from pipeline.native import address, load

LANES = 16  # of the kernel's vectors: widths are multiples of it


class Linear(nn.Linear):
    """As the torch.nn.Linear whose parameters it takes.

    torch copies the bias to every row before a bf16 product on a CPU; oneDNN needs no such copy.

    Args:
        linear: what it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if self.bias is None or not (_is_bf16_on_cpu(x) and _has_bf16_products()):
            return super().forward(x)
        out: torch.Tensor = _LinearInOneDNN.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class ResidualNorm(nn.LayerNorm):
    """A layer norm of residual + dropout(x), whose parameters it takes from a torch.nn.LayerNorm.

    Args:
        norm: what it stands for.
        p: probability of dropout while training.
    """

    def __init__(self, norm: nn.LayerNorm, p: float) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.elementwise_affine = norm.elementwise_affine
        self.weight, self.bias = norm.weight, norm.bias
        self.p = p

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Both [..., width], to the same."""
        p = self.p if self.training else 0.0
        if not (_is_bf16_on_cpu(x) and x.shape[-1] % LANES == 0 and _library() is not None):
            return super().forward(residual + dropout(x, p))
        seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if p else 0
        out: torch.Tensor = _ResidualNormInC.apply(  # type: ignore[no-untyped-call]
            x, residual, self.weight, self.bias, self.eps, p, seed
        )
        return out


class Output(nn.Module):
    """As BERT's two output layers: norm(residual + dropout(dense(x))), under their names.

    Args:
        output: what it stands for, with `dense`, `dropout` and `LayerNorm`.
    """

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.dense = Linear(output.dense)
        self.LayerNorm = ResidualNorm(output.LayerNorm, output.dropout.p)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[..., in] and [..., out] to [..., out]."""
        out: torch.Tensor = self.LayerNorm(self.dense(x), residual)
        return out


def fuse(module: nn.Module) -> None:
    """Put these layers in the place of those that they stand for, everywhere below `module`."""
    for name, child in module.named_children():
        if {part for part, _ in child.named_children()} == {"dense", "LayerNorm", "dropout"}:
            setattr(module, name, Output(child).train(child.training))
        elif type(child) is nn.Linear:
            setattr(module, name, Linear(child).train(child.training))
        else:
            fuse(child)


class _LinearInOneDNN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad_out.flatten(0, -2)
        grad_x = (rows @ weight).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, rows.t() @ x.flatten(0, -2), rows.sum(0)


class _ResidualNormInC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        p: float,
        seed: int,
    ) -> torch.Tensor:
        library = _library()
        assert library is not None
        x, residual = x.contiguous(), residual.contiguous()  # kept by name: C sees addresses only
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        total, out = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = torch.empty(2, rows)
        library.residual_norm_forward(
            *map(address, (x, residual, weight, bias)),
            rows,
            width,
            eps,
            p,
            seed,
            *map(address, (total, mean, rstd, out)),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(total, mean, rstd, weight)
        ctx.p, ctx.seed = p, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:  # type: ignore[override]
        library = _library()
        assert library is not None
        total, mean, rstd, weight = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        rows, width = mean.numel(), total.shape[-1]
        grad_x, grad_residual = torch.empty_like(total), torch.empty_like(total)
        sums = torch.zeros(2, -(-rows // library.rows_of_a_block()), width)
        library.residual_norm_backward(
            *map(address, (total, mean, rstd, weight, grad_out)),
            rows,
            width,
            ctx.p,
            ctx.seed,
            *map(address, (grad_x, grad_residual, sums)),
            torch.get_num_threads(),
        )
        grad_weight, grad_bias = sums.sum(1).to(weight.dtype)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


def _is_bf16_on_cpu(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


@functools.cache
def _has_bf16_products() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and supported


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be compiled."""
    library = load("residual_norm")
    if library is None:
        return None
    pointer, integer, double, seed = ctypes.c_void_p, ctypes.c_int, ctypes.c_double, ctypes.c_uint64
    library.residual_norm_forward.argtypes = [
        *[pointer] * 4, integer, integer, ctypes.c_float, double, seed, *[pointer] * 4, integer,
    ]  # fmt: skip
    library.residual_norm_backward.argtypes = [
        *[pointer] * 5, integer, integer, double, seed, *[pointer] * 3, integer,
    ]  # fmt: skip
    return library
