from __future__ import annotations

import importlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the fused relation loss is written in Triton")
import triton.language

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read where a function is decorated: in the kernels' module, and in Triton's own library,
    # which transformers has imported by now.
    os.environ["TRITON_INTERPRET"] = "1"
    for module in (triton.language.standard, triton.language):
        importlib.reload(module)

from pipeline.relation_kl import fused  # noqa: E402
from pipeline.relation_kl.fused import fused_relation_kl  # noqa: E402

ROOT = Path(__file__).parents[3]
BOUNDS = (0, 1, 3, 70, 75)  # one token; short segments in one block; one across blocks
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# G is rounded to the inputs' 16 bits before its product; the interpreter cuts bf16 off instead.
G_EPSILON = EPSILON | ({torch.bfloat16: 2.0**-7} if DEVICE == "cpu" else {})
WORKING = 5e-6  # of a probability in fp32, whose scores are of a few units
each_dtype = pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
each_kind = pytest.mark.parametrize("with_keys", [False, True], ids=["symmetric", "general"])


class Inputs(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    student_keys: torch.Tensor | None
    teacher_keys: torch.Tensor | None

    def double(self) -> Inputs:
        return Inputs(*(None if x is None else x.detach().cpu().double() for x in self))


class Oracle(NamedTuple):
    value: float
    gradients: tuple[torch.Tensor, ...]  # of the queries and, where given, the keys
    errors: tuple[torch.Tensor, ...]  # how far the rounding errors of probabilities may move them


def vectors(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)


def inputs(
    tokens: int,
    heads: int = 2,
    *,
    sizes: tuple[int, int] = (6, 16),
    with_keys: bool = False,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
) -> Inputs:
    widths, dtypes = (size * heads for size in sizes), (dtype, teacher_dtype or dtype)
    s, t = ([vectors(tokens, w, i, d) for i in (1, 2)] for w, d in zip(widths, dtypes, strict=True))
    return Inputs(s[0], t[0] * 1.5, *((s[1], t[1]) if with_keys else (None, None)))


def boundaries(bounds: Sequence[int]) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)


def oracle(given_inputs: Inputs, bounds: Sequence[int], heads: int) -> Oracle:
    """The formula in float64, dense, a loop over segments and heads; autograd's gradient."""
    x, t, keys, teacher_keys = given_inputs.double()
    leaves = [leaf.requires_grad_() for leaf in (x, keys) if leaf is not None]
    y, u = x if keys is None else keys, t if teacher_keys is None else teacher_keys
    errors = [torch.zeros_like(leaf) for leaf in leaves]
    total = torch.zeros((), dtype=torch.float64)
    size, teacher_size = x.shape[1] // heads, t.shape[1] // heads
    for (start, stop), head in itertools.product(itertools.pairwise(bounds), range(heads)):
        student = slice(start, stop), slice(head * size, (head + 1) * size)
        teacher = slice(start, stop), slice(head * teacher_size, (head + 1) * teacher_size)
        log_p = torch.log_softmax(x[student] @ y[student].T / math.sqrt(size), -1)
        log_r = torch.log_softmax(t[teacher] @ u[teacher].T / math.sqrt(teacher_size), -1)
        total = total + (log_r.exp() * (log_r - log_p)).sum()
        p, r = log_p.detach().exp(), log_r.exp()
        error = WORKING * (p + r)
        if given_inputs.student.dtype != torch.float32:
            error += G_EPSILON[given_inputs.student.dtype] * (p - r).abs()
        errors[0][student] += error @ y[student].abs().detach() / math.sqrt(size)
        errors[-1][student] += error.T @ x[student].abs().detach() / math.sqrt(size)
    count = heads * max(1, bounds[-1])
    value = total / count
    value.backward() if value.requires_grad else None
    zero = torch.zeros_like
    gradients = tuple(zero(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return Oracle(value.item(), gradients, tuple(e / count for e in errors))


def value_and_gradients(
    given_inputs: Inputs, bounds: Sequence[int], heads: int, upstream: float = 1.0
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    student, teacher, student_keys, teacher_keys = given_inputs
    student = student.detach().requires_grad_()
    student_keys = None if student_keys is None else student_keys.detach().requires_grad_()
    value = fused_relation_kl(
        student, teacher, student_keys, teacher_keys, boundaries(bounds), heads
    )
    (value * upstream).backward()
    leaves = (student,) if student_keys is None else (student, student_keys)
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
    return value.detach(), tuple(leaf.grad for leaf in leaves if leaf.grad is not None)


def assert_matches_oracle(
    given_inputs: Inputs, bounds: Sequence[int], heads: int, upstream: float = 1.0
) -> None:
    value, gradients = value_and_gradients(given_inputs, bounds, heads, upstream)
    expected = oracle(given_inputs, bounds, heads)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert float(value) == pytest.approx(expected.value, rel=1e-5, abs=1e-6)
    epsilon = EPSILON[given_inputs.student.dtype]
    tiny = torch.finfo(given_inputs.student.dtype).smallest_normal * epsilon  # half a step there
    for gradient, exact, error in zip(gradients, expected.gradients, expected.errors, strict=True):
        allowed = (error + epsilon * exact.abs()) * upstream * 1.05 + tiny
        difference = (gradient.cpu().double() - exact * upstream).abs()
        assert (difference <= allowed).all(), f"up to {(difference / allowed).nan_to_num().max()}"
        assert not gradient[bounds[-1] :].any()


@each_dtype
@each_kind
@pytest.mark.parametrize("sizes", [(6, 16), (8, 8), (12, 64), (16, 24), (24, 6), (64, 12)], ids=str)
def test_value_and_gradient_are_the_formulas(
    sizes: tuple[int, int], with_keys: bool, dtype: torch.dtype
) -> None:
    given_inputs = inputs(BOUNDS[-1], sizes=sizes, with_keys=with_keys, dtype=dtype)
    assert_matches_oracle(given_inputs, BOUNDS, 2)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("bounds", "tokens"),
    [
        ((0, 150), 150),  # longer than a block
        (tuple(range(41)), 40),  # each of one token
        (tuple(range(0, 100, 3)), 100),  # many in a block, and a token of padding
        ((0, 0, 5, 5, 5, 69, 69), 69),  # empty ones
        ((0, 64, 128), 128),  # whole blocks
        ((0, 20, 31), 90),  # padding from within a block on, over a whole one
        ((0, 9, 9, 9), 150),
        ((0, 0, 0), 20),  # nothing but padding
        ((0, 1), 1),
        ((0,), 0),
    ],
    ids=lambda value: str(value)[:24],
)
def test_segments_and_padding(
    bounds: tuple[int, ...], tokens: int, with_keys: bool, dtype: torch.dtype
) -> None:
    assert_matches_oracle(inputs(tokens, with_keys=with_keys, dtype=dtype), bounds, 2)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    padding=st.integers(0, 20),
    heads=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    with_keys=st.booleans(),
    dtype=st.sampled_from(list(EPSILON)),
)
def test_any_packing_and_any_head_size(
    lengths: list[int],
    padding: int,
    heads: int,
    sizes: tuple[int, int],
    with_keys: bool,
    dtype: torch.dtype,
) -> None:
    bounds = (0, *itertools.accumulate(lengths))
    given_inputs = inputs(
        bounds[-1] + padding, heads, sizes=sizes, with_keys=with_keys, dtype=dtype
    )
    assert_matches_oracle(given_inputs, bounds, heads)


def test_a_student_and_a_teacher_of_different_precision() -> None:
    given_inputs = inputs(BOUNDS[-1], teacher_dtype=torch.bfloat16)
    assert_matches_oracle(given_inputs, BOUNDS, 2)


@each_dtype
@pytest.mark.parametrize("upstream", [0.3, 1.003, 2.0**16])  # 2^16: above fp16's largest number
def test_the_gradient_is_scaled_in_fp32_and_rounded_once(
    upstream: float, dtype: torch.dtype
) -> None:
    student, teacher, student_keys, teacher_keys = inputs(20, with_keys=True, dtype=dtype)
    given_inputs = Inputs(student, teacher, student_keys, teacher_keys)
    _, gradients = value_and_gradients(given_inputs, (0, 8, 20), 2, upstream)
    _, *exact = torch.ops.minilm.relation_kl(*given_inputs, boundaries((0, 8, 20)), 2, True)
    for gradient, unrounded in zip(gradients, exact, strict=True):
        assert unrounded.dtype == torch.float32
        assert torch.equal(gradient, (unrounded * upstream).to(dtype))


def test_small_differences_keep_their_precision_in_fp16() -> None:
    """As late in training: most of G is below fp16's smallest normal number."""
    tokens = 150
    student = vectors(tokens, 12, 1, torch.float16) / 16
    teacher = student * (1 + 2**-6)
    given_inputs = Inputs(student, teacher, None, None)
    _, (gradient,) = value_and_gradients(given_inputs, (0, tokens), 2, 2.0**20)
    exact = oracle(given_inputs, (0, tokens), 2).gradients[0] * 2.0**20
    assert (gradient.cpu().double() - exact).norm() < 2 * EPSILON[torch.float16] * exact.norm()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # between segments; masked after
def test_large_scores_stay_finite() -> None:
    student, teacher, *_ = inputs(BOUNDS[-1])
    given_inputs = Inputs(student * 100, teacher * 100, None, None)
    value, (gradient,) = value_and_gradients(given_inputs, BOUNDS, 2)
    assert float(value) == pytest.approx(oracle(given_inputs, BOUNDS, 2).value, rel=1e-4)
    assert gradient.isfinite().all()


def test_the_teacher_may_be_an_inference_tensor() -> None:
    given_inputs = inputs(BOUNDS[-1], with_keys=True)
    with torch.inference_mode():
        teacher, teacher_keys = given_inputs.teacher * 1.0, given_inputs.teacher_keys * 1.0
    assert teacher.is_inference()
    assert_matches_oracle(
        given_inputs._replace(teacher=teacher, teacher_keys=teacher_keys), BOUNDS, 2
    )


@each_kind
def test_rows_may_lie_apart(with_keys: bool) -> None:
    """A slice of a joint projection, and a transposed tensor."""
    plain = inputs(20, with_keys=with_keys)
    apart = Inputs(
        *(None if x is None else torch.cat((x + 1, x, x - 1), 1).chunk(3, 1)[1] for x in plain)
    )
    transposed = Inputs(*(None if x is None else x.T.contiguous().T for x in plain))
    assert apart.student.stride(0) == 3 * plain.student.stride(0)
    assert transposed.student.stride(1) != 1
    value, gradients = value_and_gradients(plain, (0, 8, 20), 2)
    for other in (apart, transposed):
        other_value, other_gradients = value_and_gradients(other, (0, 8, 20), 2)
        assert torch.equal(value, other_value)
        assert all(map(torch.equal, gradients, other_gradients))


@each_dtype
@each_kind
def test_two_calls_give_the_same_bits(with_keys: bool, dtype: torch.dtype) -> None:
    given_inputs = inputs(BOUNDS[-1], with_keys=with_keys, dtype=dtype)
    value, gradients = value_and_gradients(given_inputs, BOUNDS, 2)
    again, gradients_again = value_and_gradients(given_inputs, BOUNDS, 2)
    assert torch.equal(value, again)
    assert all(map(torch.equal, gradients, gradients_again))


@pytest.mark.filterwarnings("ignore:.*not a double precision")
@each_kind
def test_gradcheck(with_keys: bool) -> None:
    """Differences of 1e-2 in fp32: their noise is 1e-5 next to gradients of 0.1."""
    student, teacher, student_keys, teacher_keys = inputs(4, 1, sizes=(3, 2), with_keys=with_keys)
    leaves = [x.requires_grad_() for x in (student, student_keys) if x is not None]
    cu_seqlens = boundaries((0, 3))
    assert torch.autograd.gradcheck(
        lambda x, y=None: fused_relation_kl(x, teacher, y, teacher_keys, cu_seqlens, 1),
        leaves,
        eps=1e-2,
        atol=2e-4,
        rtol=1e-2,
    )


@pytest.mark.parametrize("without", ["requires_grad", "grad_mode"])
def test_without_gradients_there_is_no_second_pass(
    without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, *_ = inputs(20)
    monkeypatch.setattr(fused, "_gradient_kernel", None)
    student.requires_grad_(without == "grad_mode")
    with torch.set_grad_enabled(without != "grad_mode"):
        value = fused_relation_kl(student, teacher, None, None, boundaries((0, 20)), 2)
    assert not value.requires_grad


@each_kind
def test_backward_keeps_the_students_gradient_and_nothing_else(with_keys: bool) -> None:
    given_inputs = inputs(20, with_keys=with_keys)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        value_and_gradients(given_inputs, (0, 20), 2)
    # Multiplying by the upstream factor keeps nothing, as that is a number.
    assert sum(saved) == given_inputs.student.numel() * (1 + with_keys)


@each_kind
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(with_keys: bool, needs_grad: bool) -> None:
    student, teacher, student_keys, teacher_keys = inputs(20, with_keys=with_keys)
    for leaf in (student, student_keys):
        if leaf is not None:
            leaf.requires_grad_(needs_grad)
    arguments = (student, teacher, student_keys, teacher_keys, boundaries((0, 8, 20)), 2)
    torch.library.opcheck(torch.ops.minilm.relation_kl.default, (*arguments, needs_grad))


@each_kind
def test_a_compiled_graph_holds_it_whole(with_keys: bool) -> None:
    def twice(queries: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        y = None if keys is None else keys * 2
        return fused_relation_kl(queries * 2, teacher, y, teacher_keys, cu_seqlens, 2) * 3

    student, teacher, student_keys, teacher_keys = inputs(
        20, with_keys=with_keys, dtype=torch.bfloat16
    )
    cu_seqlens = boundaries((0, 8, 20))
    leaves = [x.requires_grad_() for x in (student, student_keys) if x is not None]
    torch.compiler.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    results = []
    for function in (twice, compiled):
        value = function(student, student_keys)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU has a queue to wait for")
def test_the_host_does_not_wait_for_the_device() -> None:
    given_inputs = inputs(BOUNDS[-1], with_keys=True)
    cu_seqlens = boundaries(BOUNDS)
    student = given_inputs.student.requires_grad_()
    fused_relation_kl(*given_inputs, cu_seqlens, 2).backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_relation_kl(*given_inputs, cu_seqlens, 2).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"student": vectors(20, 12, 1, torch.float64)}, ["student", "float64", "chunked"]),
        ({"teacher": vectors(20, 32, 1, torch.float64)}, ["teacher", "float64", "chunked"]),
        ({"teacher": vectors(19, 32, 1)}, ["(20, 12)", "(19, 32)"]),
        ({"student": vectors(20, 12, 1)[None]}, ["student (1, 20, 12)"]),
        ({"student_keys": vectors(20, 14, 1)}, ["student", "(20, 14)", "(20, 12)"]),
        ({"teacher_keys": vectors(20, 32, 1).half()}, ["teacher", "float16", "float32"]),
        ({"teacher_keys": vectors(20, 32, 1)}, ["keys", "one model only"]),
        ({"num_heads": 5}, ["5 relation heads", "12"]),
        ({"num_heads": 0}, ["0 relation heads"]),
        ({"teacher": vectors(20, 258, 1)}, ["at most 128", "129", "chunked"]),
        ({"cu_seqlens": boundaries((0, 20)).long()}, ["cu_seqlens", "int64"]),
        ({"cu_seqlens": boundaries((0, 20))[None]}, ["cu_seqlens (1, 2)"]),
        ({"cu_seqlens": boundaries((0, 20)).to("meta")}, [DEVICE, "meta"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused_by_value(
    changes: dict[str, object], named: list[str]
) -> None:
    arguments = inputs(20)._asdict() | {"cu_seqlens": boundaries((0, 20)), "num_heads": 2}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        fused_relation_kl(**(arguments | changes))
    assert all(name in str(caught.value) for name in named), str(caught.value)


COMPILE = """
import re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.relation_kl import fused

def compiled(kernel, size_s, size_t, tile, flags):
    constants = {
        "SIZE_S": size_s, "SIZE_T": size_t, "BLOCK": tile.block, "SWEPT": tile.swept, **flags,
        "PADDED_S": max(16, triton.next_power_of_2(size_s)),
        "PADDED_T": max(16, triton.next_power_of_2(size_t)),
    }
    types = dict.fromkeys(("x_s", "y_s", "x_t", "y_t"), "*bf16")
    types |= dict.fromkeys(("begins", "ends", "count"), "*i32")
    types |= dict.fromkeys(("lse_s", "lse_t", "kl", "gradient"), "*fp32")
    types |= dict.fromkeys(("scale_s", "scale_t"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]  # addresses and strides, as at launch
    attributes = {
        (place,): divisible
        for place, (name, type_) in enumerate(signature.items())
        if type_[0] == "*" or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

KERNELS = [(fused._statistics_kernel, {})]
KERNELS += [
    (fused._gradient_kernel, {"FOR_QUERIES": queries, "FOR_KEYS": keys})
    for queries, keys in ((True, True), (True, False), (False, True))
]
for padded, tile in fused._TILES.items():
    for kernel, flags in KERNELS:
        result = compiled(kernel, padded * 3 // 8, padded, tile, flags)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(result.asm["cubin"])
            cubin.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.check_output([tool, "-res-usage", cubin.name], text=True)
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
        tensor_cores = int("wgmma" in result.asm["ptx"])
        print(padded, registers, stack, result.metadata.shared, tensor_cores)
"""


def test_each_tile_fits_a_hopper_gpu(tmp_path: Path) -> None:
    """Machine code for sm_90, which needs no GPU: registers do not spill, shared memory holds."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = tmp_path / "compile.py"  # Triton reads the source of kernels; this one has none
    script.write_text(COMPILE)
    finished = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = [tuple(map(int, line.split())) for line in finished.stdout.splitlines()]
    assert len(lines) == 4 * len(fused._TILES)
    for padded, registers, stack, shared, tensor_cores in lines:
        assert registers <= 255
        assert stack == 0, f"registers spill at head size {padded}"  # they spill to the stack
        assert shared <= 227 * 1024
        assert tensor_cores
