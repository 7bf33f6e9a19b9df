"""Time of attention over packed segments, against SDPA on padded paragraphs and on masked rows.

    python benchmarks/attention.py [--shape large] [--json]

One layer's attention in bf16 on the same paragraphs, without dropout, with the heads of the shape's
teacher and student:

- ours: `pipeline.attention.packed_attention`, every segment by itself;
- padded: scaled_dot_product_attention, micro-batches of paragraphs padded to the longest;
- block mask: scaled_dot_product_attention over the packed rows, with a mask that keeps segments
  apart.

Before that, their outputs on the real tokens must be equal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import arguments, device, interleaved, report, set_threads
from benchmarks.workload import SHAPES, add_shape_arguments, training_batches
from pipeline.attention import packed_attention

TOLERANCE = 3e-2  # of outputs below 4, in bf16
WAYS = ("padded", "block mask", "ours")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the outputs, measure, report."""
    parser = arguments(__doc__)
    add_shape_arguments(parser, batches=1, rows_per_batch=32)
    parser.add_argument("--sequences", type=int, default=32, help="padded paragraphs a micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    options = parser.parse_args(argv)
    set_threads(options.threads)
    shape = SHAPES[options.shape]
    batches = training_batches(shape, batches=options.batches, rows_per_batch=options.rows)
    lengths = [n for batch in batches for n in batch.cu_seqlens.diff().tolist()]
    rows = []
    for model, width, heads in (
        ("teacher", shape.teacher_width, shape.teacher_heads),
        ("student", shape.student_width, shape.student_heads),
    ):
        ways = make_ways(lengths, heads, width // heads, shape.seq_len, options.sequences)
        check_outputs(ways)
        for direction, call in (("forward", forward), ("forward + backward", both)):
            cases = {name: functools.partial(call, way) for name, way in ways.items()}
            seconds = interleaved(cases, repeats=options.repeats)
            rows.append(
                {
                    "heads": f"{model}, {heads} x {width // heads}",
                    "direction": direction,
                    **{f"{name} ms": 1e3 * seconds[name] for name in WAYS},
                    **{f"{name} / ours": seconds[name] / seconds["ours"] for name in WAYS[:2]},
                }
            )
    # A training step needs the teacher's forward pass, and both passes of the student.
    padded, ours = (sum(rows[i][f"{name} ms"] for i in (0, 3)) for name in ("padded", "ours"))
    report(
        "attention",
        rows,
        ("padded / ours, teacher forward + student forward and backward", padded / ours),
        options,
        shape=options.shape,
        tokens=sum(lengths),
        paragraphs=len(lengths),
        repeats=options.repeats,
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to compute attention over all tokens, in one or several calls.

    Args:
        inputs: queries, keys and values of each call, [B, heads, n, head size], with gradient.
        attend: from a call's number and inputs to its output, shaped alike.
        is_real: [B, n] of each call: what is a token, and not padding.
    """

    inputs: list[list[torch.Tensor]]
    attend: Callable[..., torch.Tensor]
    is_real: list[torch.Tensor]

    def outputs(self) -> list[torch.Tensor]:
        """Of each call."""
        return [self.attend(number, *inputs) for number, inputs in enumerate(self.inputs)]


def make_ways(
    lengths: Sequence[int], heads: int, head_size: int, seq_len: int, sequences: int
) -> dict[str, Way]:
    """The same random vectors, laid out as each way needs them."""
    torch.manual_seed(0)
    shape = (sum(lengths), heads, head_size)
    packed = [torch.randn(shape, device=device()).bfloat16() for _ in range(3)]
    bounds = [0, *itertools.accumulate(lengths)]
    paragraphs = list(itertools.pairwise(bounds))
    micro_batches = [
        paragraphs[first : first + sequences] for first in range(0, len(paragraphs), sequences)
    ]
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    number = number.to(device())
    padded_real = [_stack(number, ranges, -1) >= 0 for ranges in micro_batches]
    row_ranges = _rows(bounds, seq_len)
    row_number = _stack(number, row_ranges, -1)
    block_mask = (row_number[:, :, None] == row_number[:, None, :])[:, None]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device())

    def masked_rows(_: int, *qkv: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*qkv, attn_mask=block_mask)

    def padded(call: int, *qkv: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*qkv, attn_mask=padded_real[call][:, None, None])

    def ours(_: int, *qkv: torch.Tensor) -> torch.Tensor:
        out, _weights = packed_attention(
            torch.nn.Module(), *qkv, None, cu_seqlens=cu_seqlens, max_seqlen=seq_len
        )
        return out.transpose(1, 2)

    def laid_out(ranges: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [_stack(x, ranges, 0).transpose(1, 2).requires_grad_() for x in packed]

    everything = [(0, bounds[-1])]
    return {
        "padded": Way([laid_out(ranges) for ranges in micro_batches], padded, padded_real),
        "block mask": Way([laid_out(row_ranges)], masked_rows, [row_number >= 0]),
        "ours": Way([laid_out(everything)], ours, [_stack(number, everything, -1) >= 0]),
    }


def _stack(x: torch.Tensor, ranges: list[tuple[int, int]], padding: int) -> torch.Tensor:
    parts = [x[start:stop] for start, stop in ranges]
    return pad_sequence(parts, batch_first=True, padding_value=padding)


def _rows(bounds: Sequence[int], seq_len: int) -> list[tuple[int, int]]:
    """Ranges of whole segments, as many as fit into a row."""
    ranges = [(0, 0)]
    for start, stop in itertools.pairwise(bounds):
        row_start = ranges[-1][0]
        if stop - row_start <= seq_len:
            ranges[-1] = (row_start, stop)
        else:
            ranges.append((start, stop))
    return ranges


@torch.no_grad()
def check_outputs(ways: dict[str, Way]) -> None:
    """Compare what the ways give for the real tokens.

    Raises:
        SystemExit: one differs by more than rounding.
    """
    real = {
        name: torch.cat(
            [
                out.transpose(1, 2)[is_real]
                for out, is_real in zip(way.outputs(), way.is_real, strict=True)
            ]
        ).float()
        for name, way in ways.items()
    }
    for name in WAYS[:2]:
        difference = float((real[name] - real["ours"]).abs().max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} attention differs from ours by {difference}")


def forward(way: Way) -> None:
    """Without gradient."""
    with torch.no_grad():
        way.outputs()


def both(way: Way) -> None:
    """Forward, and backward from a gradient of ones."""
    outputs = way.outputs()
    inputs = [x for inputs in way.inputs for x in inputs]
    torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])


if __name__ == "__main__":
    main()
