from __future__ import annotations

from typing import Any

import pytest
import torch

from data_prep.command import RunError
from pipeline.corruption import digest, refuse_differences

HOSTS = [f"n{rank}" for rank in range(5)]


def ranks(*values: str, hardware: str = "ABCDE", same: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "hardware": "A" if same else hardware[rank],
            "facts": {"loss of x": "1", "loss of y": value},
        }
        for rank, value in enumerate(values)
    ]


def test_equal_ranks_pass() -> None:
    refuse_differences(ranks(*"aaaaa"), 8, HOSTS)
    refuse_differences(ranks("a"), 8, HOSTS)


def test_unlike_hardware_is_not_compared() -> None:
    refuse_differences(ranks(*"abcde", same=False), 8, HOSTS)


@pytest.mark.parametrize(
    ("values", "named", "is_tie"),
    [
        ("aabaa", [2], False),
        ("abaca", [1, 3], False),
        ("ab", [0, 1], True),
        ("abab", [0, 1, 2, 3], True),
    ],
)
def test_the_minority_is_named(values: str, named: list[int], is_tie: bool) -> None:
    with pytest.raises(RunError) as caught:
        refuse_differences(ranks(*values), 8, HOSTS)
    message = str(caught.value)
    assert message.startswith("step 8: the loss of y differ")
    assert [rank for rank in range(5) if f"rank {rank} (n{rank})" in message] == named
    assert ("contradict each other" in message) is is_tie


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_bit_of_any_tensor_counts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(3)]
    whole = {digest(tensors)}
    width = 8 * tensors[0].element_size()
    bits = {16: torch.int16, 32: torch.int32}[width]
    for tensor in tensors:
        for bit in range(width):
            tensor.view(bits)[3, 2] ^= -(2 ** (width - 1)) if bit == width - 1 else 1 << bit
            whole.add(digest(tensors))
            tensor.view(bits)[3, 2] ^= -(2 ** (width - 1)) if bit == width - 1 else 1 << bit
    assert len(whole) == 1 + 3 * width
    assert digest(tensors[::-1]) not in whole
    assert digest([]) == ""
