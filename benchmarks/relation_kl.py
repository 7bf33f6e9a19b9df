"""Time and peak memory of the relation loss with its gradient, against the dense formula.

    python benchmarks/relation_kl.py [--tokens 4096] [--json]

Both take the same bf16 vectors of segments of equal length, so nothing is padded: ours packed
through `relation_kl(implementation="auto")`, the dense formula as [segments, heads, n, n] tensors
in fp32, as public code writes it. One relation, forward and backward. On a CPU, peaks are those of
new processes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.dense import dense_relation_kl
from benchmarks.harness import (
    arguments,
    device,
    in_fresh_process,
    interleaved,
    peak_bytes,
    report,
    set_threads,
)
from pipeline.relation_kl import relation_kl

TOLERANCE = 1e-3  # relative, of the two losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Segments of one length, and the vectors' widths."""

    tokens: int
    seq_len: int
    heads: int
    student_width: int
    teacher_width: int


TINY = Size(tokens=8192, seq_len=64, heads=8, student_width=32, teacher_width=64)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every size, report."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=("full", "tiny"), default="full", help="the sizes")
    on_gpu = device().type == "cuda"
    parser.add_argument("--tokens", type=int, default=16384 if on_gpu else 4096, help="of a call")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    options = parser.parse_args(argv)
    set_threads(options.threads)
    grid = sizes(options.tokens) if options.shape == "full" else [TINY]
    rows = [measure(size, options.repeats) for size in grid]
    last = rows[-1]
    report(
        "relation_kl",
        rows,
        (f"dense / ours, peak memory at {last['seq']} x {last['heads']}", last["memory ratio"]),
        options,
        tokens=grid[-1].tokens,
        repeats=options.repeats,
    )


def sizes(tokens: int) -> list[Size]:
    """What base and large teachers have; the largest comes last."""
    return [
        Size(tokens=tokens, seq_len=n, heads=heads, student_width=384, teacher_width=width)
        for heads, width in ((12, 768), (48, 768), (64, 1024))
        for n in (64, 128, 256, 512)
    ]


def measure(size: Size, repeats: int) -> dict[str, float]:
    """A row of the table."""
    cases = {name: case(name, size) for name in ("dense", "ours")}
    dense, ours = (float(case()) for case in cases.values())
    if not abs(ours - dense) <= TOLERANCE * dense:
        raise SystemExit(f"{size}: the loss is {ours}, the dense formula's {dense}")
    seconds = interleaved(cases, repeats=repeats)
    memory = {name: case_peak(name, size) for name in cases}
    return {
        "seq": size.seq_len,
        "heads": size.heads,
        "teacher width": size.teacher_width,
        "dense ms": 1e3 * seconds["dense"],
        "ours ms": 1e3 * seconds["ours"],
        "time ratio": seconds["dense"] / seconds["ours"],
        "dense MiB": memory["dense"] / 2**20,
        "ours MiB": memory["ours"] / 2**20,
        "memory ratio": memory["dense"] / memory["ours"],
    }


def case(name: str, size: Size) -> Callable[[], torch.Tensor]:
    """A call that computes loss and gradient, and returns the loss."""
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(size.tokens, width, device=device()).bfloat16()
        for width in (size.student_width, size.teacher_width)
    )
    student.requires_grad_()
    bounds = torch.arange(0, size.tokens + 1, size.seq_len, dtype=torch.int32, device=device())
    mask = torch.ones(len(bounds) - 1, size.seq_len, dtype=torch.long, device=device())

    def dense() -> torch.Tensor:
        padded = (vectors.unflatten(0, (-1, size.seq_len)) for vectors in (student, teacher))
        return dense_relation_kl(*padded, mask, size.heads)

    def ours() -> torch.Tensor:
        return relation_kl(student, teacher, bounds, size.heads)

    return functools.partial(_with_gradient, dense if name == "dense" else ours, student)


def _with_gradient(loss: Callable[[], torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    value = loss()
    torch.autograd.grad(value, student)
    return value.detach()


def case_peak(name: str, size: Size) -> int:
    """Peak memory of a call, its inputs left out."""
    if device().type == "cuda":
        return peak_bytes(case(name, size))
    return in_fresh_process(_fresh_peak, name, size, torch.get_num_threads())


def _fresh_peak(name: str, size: Size, threads: int) -> int:
    set_threads(threads)
    small = dataclasses.replace(size, tokens=2 * 16, seq_len=16)
    case(name, small)()  # libraries take their own memory at their first call
    return peak_bytes(case(name, size))


if __name__ == "__main__":
    main()
