from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from pipeline.native import load
from pipeline.relation_kl import IMPLEMENTATIONS, chunked, native, relation_kl

BOUNDS = (0, 5, 6, 13)  # three segments, one of a single token
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
# Triton's has a file of its own. Without a C compiler, torch's operations stand in for the kernel.
HERE = ("reference", "chunked", "chunked without C")
each_implementation = pytest.mark.parametrize("implementation", HERE)


@pytest.fixture(autouse=True)
def no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the kernel away where a test's implementation says so."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("implementation") == "chunked without C":
        monkeypatch.setattr(native, "function", lambda: None)
        monkeypatch.setitem(IMPLEMENTATIONS, "chunked without C", IMPLEMENTATIONS["chunked"])


# Relative errors of value and gradient. The value is always at least fp32; the gradient has the
# student's dtype, into which it may be rounded once.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 1.05 * 2**-8),
    torch.float16: (1e-5, 1.05 * 2**-11),
}


def log_relation(vectors: torch.Tensor, query: int, keys: range, columns: range) -> torch.Tensor:
    """Log softmax of one query's scaled scores, score by score."""
    part = vectors[:, columns.start : columns.stop]
    scores = [(part[query] * part[key]).sum() / math.sqrt(len(columns)) for key in keys]
    largest = max(score.item() for score in scores)
    exponentials = [torch.exp(score - largest) for score in scores]
    normaliser = largest + torch.log(torch.stack(exponentials).sum())
    return torch.stack([score - normaliser for score in scores])


def oracle(
    student: torch.Tensor, teacher: torch.Tensor, bounds: Sequence[int], heads: int
) -> torch.Tensor:
    """The formula, by loops over segments, heads and queries; shares no code with the project."""
    widths = student.shape[1] // heads, teacher.shape[1] // heads
    terms = []
    for start, stop in itertools.pairwise(bounds):
        for head in range(heads):
            columns = [range(head * width, (head + 1) * width) for width in widths]
            for query in range(start, stop):
                log_s = log_relation(student, query, range(start, stop), columns[0])
                log_t = log_relation(teacher, query, range(start, stop), columns[1])
                terms += [log_t[i].exp() * (log_t[i] - log_s[i]) for i in range(stop - start)]
    return torch.stack(terms).sum() / (heads * bounds[-1])


def vectors(
    width: int, seed: int, dtype: torch.dtype = torch.float64, tokens: int = BOUNDS[-1]
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradient(
    loss: Loss,
    student: torch.Tensor,
    teacher: torch.Tensor,
    bounds: Sequence[int],
    heads: int,
    upstream: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher, torch.tensor(bounds, dtype=torch.int32), heads)
    (value * upstream).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_matches_oracle(
    loss: Loss,
    student: torch.Tensor,
    teacher: torch.Tensor,
    heads: int,
    *,
    bounds: Sequence[int] = BOUNDS,
    upstream: float = 1.0,
) -> None:
    """Value and gradient equal the oracle's on the same (rounded) inputs."""
    value, gradient = value_and_gradient(loss, student, teacher, bounds, heads, upstream)
    expected_value, expected_gradient = value_and_gradient(
        lambda s, t, _, h: oracle(s, t, bounds, h),
        student.double(),
        teacher.double(),
        bounds,
        heads,
        upstream,
    )
    assert gradient.dtype == student.dtype
    value_error, gradient_error = TOLERANCES[student.dtype]
    torch.testing.assert_close(value.double(), expected_value, rtol=value_error, atol=value_error)
    # Cancellation leaves an absolute error of the working precision, next to the rounding's.
    working_error = TOLERANCES[value.dtype][1] * float(expected_gradient.abs().max())
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=gradient_error, atol=working_error
    )


def implemented(implementation: str) -> Loss:
    return lambda s, t, cu, h: relation_kl(s, t, cu, h, implementation=implementation)


@each_implementation
@pytest.mark.parametrize("heads", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_value_and_gradient_are_the_formulas(
    implementation: str, heads: int, dtype: torch.dtype
) -> None:
    student, teacher = vectors(16, 1, dtype), vectors(48, 2, dtype)
    assert_matches_oracle(implemented(implementation), student, teacher, heads)


@each_implementation
@pytest.mark.parametrize("widths", [(8, 8), (8, 24), (24, 8)], ids=str)
@pytest.mark.parametrize(
    "bounds", [(0, 9), tuple(range(10)), (0, 1, 9), (0, 8, 9), (0, 3, 6, 9)], ids=str
)
def test_segments_and_widths(
    implementation: str, widths: tuple[int, int], bounds: tuple[int, ...]
) -> None:
    student, teacher = vectors(widths[0], 3, tokens=9), vectors(widths[1], 4, tokens=9)
    assert_matches_oracle(implemented(implementation), student, teacher, 2, bounds=bounds)


@each_implementation
@pytest.mark.parametrize(
    ("dtype", "upstream"),
    [
        (torch.float32, 0.3),
        (torch.bfloat16, 1.003),  # a micro-batch's share of the tokens: no bf16 number
        (torch.float16, 1.003),
        (torch.float16, 2.0**16),  # a loss scale: above fp16's largest number
        (torch.float16, 2.0**12),
    ],
    ids=str,
)
def test_the_gradient_is_rounded_once_after_it_is_scaled(
    implementation: str, dtype: torch.dtype, upstream: float
) -> None:
    student, teacher = vectors(16, 1, dtype), vectors(48, 2, dtype)
    assert_matches_oracle(implemented(implementation), student, teacher, 4, upstream=upstream)


def test_a_small_fp16_gradient_is_scaled_before_it_is_rounded_to_nothing() -> None:
    student = vectors(16, 1, torch.float16)
    teacher = (student.double() * (1 + 2**-9)).half()  # nearly there, as after much training
    _, plain = value_and_gradient(relation_kl, student, teacher, BOUNDS, 4)
    _, scaled = value_and_gradient(relation_kl, student, teacher, BOUNDS, 4, 2.0**14)
    _, exact = value_and_gradient(relation_kl, student.float(), teacher.float(), BOUNDS, 4)
    torch.testing.assert_close(scaled.float() / 2**14, exact, rtol=2e-3, atol=1e-9)
    assert not torch.allclose(plain.float(), exact, rtol=2e-3, atol=1e-9)  # why scales exist


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_implementation
def test_the_result_has_at_least_single_precision(implementation: str, dtype: torch.dtype) -> None:
    cu_seqlens = torch.tensor(BOUNDS)
    loss = relation_kl(
        vectors(8, 1, dtype), vectors(8, 2, dtype), cu_seqlens, 2, implementation=implementation
    )
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not loss.requires_grad


@each_implementation
def test_a_student_and_a_teacher_of_different_precision(implementation: str) -> None:
    student, teacher = vectors(16, 1, torch.float32), vectors(48, 2, torch.bfloat16)
    assert_matches_oracle(implemented(implementation), student, teacher, 4)


@each_implementation
def test_the_teacher_may_be_an_inference_tensor(implementation: str) -> None:
    plain = vectors(48, 2, torch.float32)
    with torch.inference_mode():
        teacher = plain * 1.0
    assert teacher.is_inference()
    assert_matches_oracle(
        lambda s, t, cu, h: implemented(implementation)(s, teacher, cu, h),
        vectors(16, 1, torch.float32),
        plain,
        4,
    )


@pytest.mark.parametrize("elements", [1, 8, 29, 30, 50, 10**6])
def test_blocks_of_any_size_add_up(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", elements)
    assert_matches_oracle(implemented("chunked"), vectors(16, 1), vectors(48, 2), 4)


def test_a_block_holds_no_more_scores_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, heads = 64, 4
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 3 * heads * num_tokens)
    largest = 0
    plain_log_softmax = torch.Tensor.log_softmax

    def watched(scores: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return plain_log_softmax(scores, dim=dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", watched)
    student, teacher = vectors(16, 1, tokens=num_tokens), vectors(16, 2, tokens=num_tokens)
    relation_kl(student.requires_grad_(), teacher, torch.tensor([0, num_tokens]), heads)
    assert largest == 3 * heads * num_tokens


@each_implementation
def test_gradcheck(implementation: str) -> None:
    student, teacher = vectors(6, 1, tokens=7).requires_grad_(), vectors(4, 2, tokens=7)
    cu_seqlens = torch.tensor([0, 1, 4, 7])
    assert torch.autograd.gradcheck(
        lambda s: relation_kl(s, teacher, cu_seqlens, 2, implementation=implementation), student
    )


@each_implementation
def test_equal_relations_have_no_loss_and_no_gradient(implementation: str) -> None:
    """Relations are scalar products, so a rotation within each head does not change them."""
    heads = 2
    student = vectors(8, 1)
    rotation = torch.linalg.qr(vectors(4, 5, tokens=4))[0]
    teacher = (student.unflatten(1, (heads, 4)) @ rotation).flatten(1)
    assert not torch.allclose(student, teacher)
    value, gradient = value_and_gradient(
        implemented(implementation), student, teacher, BOUNDS, heads
    )
    assert abs(float(value)) < 1e-14
    assert float(gradient.abs().max()) < 1e-14


@each_implementation
def test_parts_weighted_by_their_tokens_make_the_whole(implementation: str) -> None:
    loss = implemented(implementation)
    student, teacher = vectors(16, 1), vectors(48, 2)
    whole = loss(student, teacher, torch.tensor(BOUNDS), 4)
    parts = [
        loss(student[:6], teacher[:6], torch.tensor([0, 5, 6]), 4) * 6,
        loss(student[6:], teacher[6:], torch.tensor([0, 7]), 4) * 7,
    ]
    torch.testing.assert_close(sum(parts) / 13, whole, rtol=1e-12, atol=0)


def test_backward_keeps_the_students_gradient_and_nothing_else() -> None:
    student, teacher = vectors(16, 1).requires_grad_(), vectors(48, 2)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        relation_kl(student, teacher, torch.tensor(BOUNDS), 4)
    assert saved == [student.numel()]


@each_implementation
def test_large_scores_stay_finite(implementation: str) -> None:
    value, gradient = value_and_gradient(
        implemented(implementation),
        vectors(8, 1, torch.float32) * 100,
        vectors(8, 2, torch.float32) * 100,
        BOUNDS,
        2,
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


def candidate(
    *,
    swapped: bool = False,
    scaled: bool = True,
    teacher_scale_of_student: bool = False,
    borders: bool = True,
    detached_keys: bool = False,
    interleaved_heads: bool = False,
    mean_of_segments: bool = False,
    summed_heads: bool = False,
    factor: float = 1.0,
) -> Loss:
    """A dense implementation with faults to choose from."""

    def log_relations(x: torch.Tensor, heads: int, width: int, keys: torch.Tensor) -> torch.Tensor:
        shape = (-1, heads) if interleaved_heads else (heads, -1)
        split = x.unflatten(1, shape)
        split = split.permute(2, 0, 1) if interleaved_heads else split.transpose(0, 1)
        other = split.detach() if detached_keys else split
        scores = split @ other.transpose(1, 2) / (math.sqrt(width / heads) if scaled else 1.0)
        return scores.masked_fill(~keys, -1e300).log_softmax(-1)

    def loss(
        student: torch.Tensor, teacher: torch.Tensor, cu_seqlens: torch.Tensor, heads: int
    ) -> torch.Tensor:
        place = torch.arange(len(student))
        segment = torch.bucketize(place, cu_seqlens, right=True)
        keys = (segment[:, None] == segment[None, :]) | (not borders)
        teacher_width = (student if teacher_scale_of_student else teacher).shape[1]
        log_s = log_relations(student, heads, student.shape[1], keys)
        log_t = log_relations(teacher, heads, teacher_width, keys)
        log_p, log_q = (log_s, log_t) if swapped else (log_t, log_s)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl = kl.sum(0) if summed_heads else kl.mean(0)
        if mean_of_segments:
            kl = kl / torch.bincount(segment)[segment] / len(segment.unique()) * len(kl)
        return kl.mean() * factor

    return loss


def test_the_oracle_accepts_a_right_loss() -> None:
    assert_matches_oracle(candidate(), vectors(16, 1), vectors(48, 2), 4)


@pytest.mark.parametrize(
    "fault",
    [
        {"swapped": True},
        {"scaled": False},
        {"teacher_scale_of_student": True},
        {"borders": False},
        {"detached_keys": True},  # halves the gradient: only the rows' term is left
        {"interleaved_heads": True},
        {"mean_of_segments": True},
        {"summed_heads": True},
        {"factor": 0.0},
        {"factor": -1.0},
        {"factor": 1.0001},
    ],
    ids=str,
)
def test_the_oracle_rejects_wrong_losses(fault: dict[str, bool | float]) -> None:
    with pytest.raises(AssertionError):
        assert_matches_oracle(candidate(**fault), vectors(16, 1), vectors(48, 2), 4)


def test_a_dropped_term_of_the_gradient_shows_in_the_gradient_alone() -> None:
    student, teacher = vectors(16, 1), vectors(48, 2)
    whole, _ = value_and_gradient(candidate(), student, teacher, BOUNDS, 4)
    halved, _ = value_and_gradient(candidate(detached_keys=True), student, teacher, BOUNDS, 4)
    assert whole == halved


@pytest.mark.parametrize(
    ("student", "teacher", "bounds", "heads", "named"),
    [
        ((13, 16), (12, 48), BOUNDS, 4, ["(13, 16)", "(12, 48)"]),
        ((13, 16), (13, 48, 1), BOUNDS, 4, ["(13, 48, 1)"]),
        ((13, 16), (13, 48), BOUNDS, 3, ["3 relation heads", "student", "16"]),
        ((13, 24), (13, 16), BOUNDS, 3, ["3 relation heads", "teacher", "16"]),
        ((13, 16), (13, 48), BOUNDS, 32, ["32 relation heads", "16"]),
        ((13, 16), (13, 48), BOUNDS, 0, ["0 relation heads"]),
        ((13, 16), (13, 48), BOUNDS, -4, ["-4 relation heads"]),
        ((13, 16), (13, 48), (0, 5, 14), 4, ["T=13", "[0, 5, 14]"]),
        ((13, 16), (13, 48), (0, 0), 4, ["T=13", "[0, 0]"]),
        ((13, 16), (13, 48), (1, 5, 13), 4, ["[1, 5, 13]"]),
        ((13, 16), (13, 48), (0, 6, 5, 13), 4, ["[0, 6, 5, 13]"]),
        ((13, 16), (13, 48), (0,), 4, ["[0]"]),
        ((0, 16), (0, 48), (0, 0), 4, ["[0, 0]"]),
    ],
    ids=str,
)
@each_implementation
def test_what_does_not_fit_together_is_refused_by_value(
    implementation: str,
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    bounds: tuple[int, ...],
    heads: int,
    named: list[str],
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        relation_kl(
            torch.zeros(student),
            torch.zeros(teacher),
            torch.tensor(bounds),
            heads,
            implementation=implementation,
        )
    assert all(name in str(caught.value) for name in named), str(caught.value)


def test_an_unknown_implementation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fast' is unknown.*reference.*chunked"):
        relation_kl(vectors(4, 1), vectors(4, 2), torch.tensor(BOUNDS), 2, implementation="fast")


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(16, 48), (24, 12)], ids=str)
def test_relations_between_two_kinds_of_vectors(
    implementation: str, dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    """Queries with keys: attention distributions. Both gradients are the dense formula's."""
    heads = 4
    given = [vectors(widths[i // 2], i, dtype) for i in range(4)]  # student q, k; teacher q, k
    leaves = [x.clone().requires_grad_() for x in given[:2]]
    value = relation_kl(
        leaves[0],
        given[2],
        torch.tensor(BOUNDS),
        heads,
        student_keys=leaves[1],
        teacher_keys=given[3],
        implementation=implementation,
    )
    value.backward()
    exact = [x.double().requires_grad_() for x in given]
    terms = []
    for start, stop in itertools.pairwise(BOUNDS):
        for head in range(heads):
            logs = []
            for q, k in (exact[:2], exact[2:]):
                d = q.shape[1] // heads
                own = slice(head * d, (head + 1) * d)
                logs.append((q[start:stop, own] @ k[start:stop, own].T / d**0.5).log_softmax(-1))
            log_s, log_t = logs
            terms.append((log_t.exp() * (log_t - log_s)).sum())
    expected = torch.stack(terms).sum() / (heads * BOUNDS[-1])
    expected.backward()
    value_error, gradient_error = TOLERANCES[dtype]
    torch.testing.assert_close(
        value.detach().double(), expected.detach(), rtol=value_error, atol=value_error
    )
    for leaf, true in zip(leaves, exact[:2], strict=True):
        working_error = TOLERANCES[value.dtype][1] * float(true.grad.abs().max())
        torch.testing.assert_close(
            leaf.grad.double(), true.grad, rtol=gradient_error, atol=working_error
        )


@each_implementation
def test_keys_that_are_the_queries_are_the_symmetric_relation(implementation: str) -> None:
    student, teacher, cu_seqlens = vectors(16, 1), vectors(48, 2), torch.tensor(BOUNDS)
    options = {"implementation": implementation}
    plain = relation_kl(student, teacher, cu_seqlens, 4, **options)
    keyed = relation_kl(
        student, teacher, cu_seqlens, 4, student_keys=student, teacher_keys=teacher, **options
    )
    torch.testing.assert_close(keyed, plain, rtol=1e-14, atol=0)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_empty_segments_and_tokens_behind_the_last_count_for_nothing(
    implementation: str, dtype: torch.dtype
) -> None:
    loss = implemented(implementation)
    student, teacher = vectors(16, 1, dtype), vectors(48, 2, dtype)
    padded = [torch.cat([x, torch.full_like(x[:3], 7.0)]) for x in (student, teacher)]
    plain = value_and_gradient(loss, student, teacher, BOUNDS, 4)
    with_padding = value_and_gradient(loss, *padded, (0, 5, 5, 6, 13, 13, 13), 4)
    torch.testing.assert_close(with_padding[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(with_padding[1][:13], plain[1], rtol=1e-6, atol=0)
    assert torch.equal(with_padding[1][13:], torch.zeros(3, 16, dtype=dtype))


@pytest.mark.parametrize("lengths", [(3, 16, 17, 100, 1), (300,), (64,) * 4], ids=str)
@pytest.mark.parametrize("widths", [(24, 48), (18, 12), (5, 7)], ids=str)
def test_the_kernel_over_long_and_uneven_segments(
    lengths: tuple[int, ...], widths: tuple[int, int]
) -> None:
    """Against torch's operations in fp64, which other tests hold to the formula."""
    bounds = (0, *itertools.accumulate(lengths))
    heads = 1 if widths[0] == 5 else 6
    student, teacher = (
        2 * vectors(width, seed, torch.float32, bounds[-1]) for seed, width in enumerate(widths)
    )
    loss = implemented("chunked")
    value, gradient = value_and_gradient(loss, student, teacher, bounds, heads)
    exact = value_and_gradient(loss, student.double(), teacher.double(), bounds, heads)
    torch.testing.assert_close(value.double(), exact[0], rtol=2e-6, atol=0)
    worst = float((gradient.double() - exact[1]).abs().max())
    assert worst <= 2e-5 * float(exact[1].abs().max())


def test_the_kernel_gives_the_same_bits_for_any_number_of_threads() -> None:
    student, teacher = vectors(24, 1, torch.bfloat16), vectors(48, 2, torch.bfloat16)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(implemented("chunked"), student, teacher, BOUNDS, 6))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_keys_of_one_model_alone_are_refused() -> None:
    student, teacher = vectors(16, 1), vectors(48, 2)
    with pytest.raises(ValueError, match="one model only"):
        relation_kl(student, teacher, torch.tensor(BOUNDS), 4, student_keys=student)


def test_without_a_compiler_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="several times longer .*gcc makes it fast"):
        assert load.__wrapped__("relation_kl") is None


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="false does not compile"):
        assert load.__wrapped__("relation_kl") is None


def test_a_folder_from_which_nothing_can_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr("pipeline.native.ctypes.CDLL", refuse)
    with pytest.warns(UserWarning, match="failed to map segment.*set TMPDIR"):
        assert load.__wrapped__("relation_kl") is None
