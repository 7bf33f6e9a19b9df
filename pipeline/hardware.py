"""What a plan assumes of devices and networks."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU by its maker's data sheet.

    Args:
        memory: bytes.
        dense_flops: a second, of bf16 products without sparsity.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second in one direction, to the GPUs of its node.
        watts: at most.
    """

    memory: float
    dense_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    watts: float


def _gpu(gb: float, tflops: float, tb_s: float, link_gb_s: float, watts: float) -> Gpu:
    return Gpu(
        memory=1e9 * gb,
        dense_flops=1e12 * tflops,
        memory_bandwidth=1e12 * tb_s,
        link_bandwidth=1e9 * link_gb_s,
        watts=watts,
    )


GPUS = {
    "L4": _gpu(24, 121, 0.30, 32, 72),
    "L40S": _gpu(48, 362, 0.864, 32, 350),
    "A100-40GB": _gpu(40, 312, 1.555, 300, 400),
    "A100": _gpu(80, 312, 2.039, 300, 400),
    "H100": _gpu(80, 989, 3.35, 450, 700),
    "H200": _gpu(141, 989, 4.8, 450, 700),
    "B200": _gpu(180, 2250, 7.7, 900, 1000),
}
MATMUL_OF_DATA_SHEET = 0.75  # assumed: what a plain product reaches of the data sheet's figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What ranks are connected by.

    Args:
        ranks_per_node: ranks of a node.
        rank_bytes: a second, of one rank's links within its node.
        node_bytes: a second, of a whole node's network.
        overlap: share of a gradient all-reduce that hides behind the backward pass.
    """

    ranks_per_node: int
    rank_bytes: float
    node_bytes: float
    overlap: float

    def all_gather_seconds(self, ranks: int, num_bytes: float) -> float:
        """In a ring, without latency: each rank receives what the others have."""
        bandwidth = self.rank_bytes if ranks <= self.ranks_per_node else self.node_bytes
        return (ranks - 1) / ranks * num_bytes / bandwidth

    def all_reduce_seconds(self, ranks: int, num_bytes: float) -> float:
        """In a ring: a reduce-scatter and an all-gather."""
        return 2 * self.all_gather_seconds(ranks, num_bytes)

    def step_seconds(
        self,
        ranks: int,
        *,
        stage: int,
        parameters: int,
        words: int,
        micro_batches: int,
        gradient_bytes: int,
        weight_bytes: int,
    ) -> tuple[float, float]:
        """What DeepSpeed sends in an optimizer step, not hidden: gradients, and weights.

        Stage 1 reduces gradients with one all-reduce a step, stage 2 after each micro-batch, those
        of the word embeddings once (pipeline/embedding.py); both gather the weights once. Stage 3
        scatters the sums after each micro-batch, and gathers weights for each of its two passes.

        Args:
            ranks: that train.
            stage: of ZeRO.
            parameters: of the student.
            words: those of its word embeddings.
            micro_batches: of a rank's step.
            gradient_bytes: of an element.
            weight_bytes: of an element.
        """
        if stage == 3:
            reduce = micro_batches * self.all_gather_seconds(ranks, parameters * gradient_bytes)
            gather = self.all_gather_seconds(ranks, parameters * weight_bytes)
            return (1 - self.overlap) * reduce, 2 * micro_batches * gather
        reduced = parameters
        if stage == 2:
            reduced = words + micro_batches * (parameters - words)
        reduce = self.all_reduce_seconds(ranks, reduced * gradient_bytes)
        gather = self.all_gather_seconds(ranks, parameters * weight_bytes)
        return (1 - self.overlap) * reduce, gather


def matmul_peak(dtype: torch.dtype, *, size: int | None = None, seconds: float = 2.0) -> float:
    """The FLOP/s that a plain square matmul reaches here: the median of repeated calls.

    Args:
        dtype: of both factors.
        size: rows and columns; None is what fills the device (8192 on a GPU, 1024 on a CPU, whose
            caches larger ones leave).
        seconds: to spend.
    """
    has_gpu = torch.cuda.is_available()
    n = size or (8192 if has_gpu else 1024)
    on = torch.device("cuda" if has_gpu else "cpu")
    left, right = (torch.randn(n, n, device=on).to(dtype) for _ in range(2))
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        left @ right
        if has_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times)
