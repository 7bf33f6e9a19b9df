"""A frozen model's linear layers in 8-bit floating point, for GPUs that multiply it.

Weights are rounded to e4m3 once, with a scale for each output, activations in every call, with a
scale for each token; products are added up in fp32. What that does to the teacher's relations is
measured by benchmarks/float8.py.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
CAPABILITY = (9, 0)  # of the first GPUs that take a scale for each row
MULTIPLE = 16  # of a width, which the kernels ask for


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, width] as e4m3, and the fp32 scales [N, 1] that bring them back."""
    scales = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scales).to(FLOAT8), scales


class Float8Linear(nn.Module):
    """x W^T + b with both factors in e4m3, for a weight that never changes.

    Args:
        linear: the layer to stand for, in bf16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scales = quantize(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out] in the dtype of x."""
        rows, scales = quantize(x.flatten(0, -2))
        product: torch.Tensor = scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scales,
            scale_recipe_a=ScalingType.RowWise,
            scale_b=self.scales.t(),
            scale_recipe_b=ScalingType.RowWise,
            bias=self.bias,
            output_dtype=x.dtype,
        )
        shaped: torch.Tensor = product.unflatten(0, x.shape[:-1])
        return shaped


def to_float8(module: nn.Module) -> None:
    """Replace the linear layers below `module`, which must be frozen, where their widths allow."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            to_float8(child)
        elif child.in_features % MULTIPLE == child.out_features % MULTIPLE == 0:
            setattr(module, name, Float8Linear(child))
