"""Two gloo processes go through every case once; the tests look at what each of them saw."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from data_prep.command import EXIT_BAD_CONFIG, EXIT_FAILED, ConfigError, ElsewhereError, RunError
from pipeline.collectives import (
    agree,
    all_sum,
    copy_from_rank_0,
    gather,
    naming_lost_ranks,
    on_rank_0,
)


def fail(error: Exception, *ranks: int) -> Callable[[], str]:
    """Work that fails on some ranks."""

    def work() -> str:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank in ranks:
            raise error
        return f"done on {rank}"

    return work


def count_calls() -> tuple[int, int]:
    """How often rank 0's work ran here, and what it gave."""
    calls: list[int] = []
    given = on_rank_0(lambda: calls.append(1) or 42)
    return len(calls), given


def sum_in_place() -> tuple[list[float], list[float]]:
    values = torch.tensor([1.0, 10.0]) * (dist.get_rank() + 1)
    result = all_sum(values)
    return values.tolist(), result.tolist()


def copy_over() -> list[list[float]]:
    """Tensors of two dtypes, one of them a transposed view and one that trains."""
    rank = dist.get_rank()
    matrix = torch.arange(4.0).reshape(2, 2) + 10 * rank
    mask, weight = torch.tensor([1 - rank, rank], dtype=torch.uint8), torch.tensor([0.5 - rank])
    copy_from_rank_0([matrix.T, mask, weight.requires_grad_()], torch.device("cpu"))
    return [matrix.flatten().tolist(), mask.tolist(), weight.tolist()]


CASES: dict[str, Callable[[], Any]] = {
    "sum": sum_in_place,
    "copy": copy_over,
    "gather": lambda: gather({"rank": dist.get_rank()}),
    "agree": lambda: agree(fail(ValueError("unused"))),
    "rank 0": count_calls,
    "rank 0 returns none": lambda: on_rank_0(lambda: None),
    "both fail": lambda: agree(fail(RunError("both"), 0, 1)),
    "rank 0 fails": lambda: agree(fail(RunError("only 0"), 0)),
    "rank 1 fails": lambda: agree(fail(RunError("only 1"), 1)),
    "rank 1 has a bad recipe": lambda: agree(fail(ConfigError("bad"), 1)),
    "rank 1 has a bug": lambda: agree(fail(ZeroDivisionError("bug"), 1)),
    "rank 0's work fails": lambda: on_rank_0(fail(ConfigError("bad"), 0)),
    "rank 0's work cannot be asked of rank 1": lambda: on_rank_0(fail(RunError("never"), 1)),
    "after all that": lambda: gather(dist.get_rank()),
}


def visit_all(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    seen: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            seen[name] = case()
        except Exception as error:
            seen[name] = (type(error), str(error), getattr(error, "status", None))
    (Path(folder) / f"rank-{rank}").write_bytes(pickle.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw in each case."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(visit_all, args=(str(folder),), nprocs=2)
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(2)]


def both(seen: list[dict[str, Any]], case: str) -> list[Any]:
    return [rank[case] for rank in seen]


def test_all_sum_adds_in_place(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "sum") == [([3.0, 30.0], [3.0, 30.0])] * 2


def test_everybody_gets_rank_0s_tensors(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "copy") == [[[0.0, 1.0, 2.0, 3.0], [1, 0], [0.5]]] * 2


def test_gather_is_in_the_order_of_ranks(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "gather") == [[{"rank": 0}, {"rank": 1}]] * 2


def test_agree_gathers_results(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "agree") == [["done on 0", "done on 1"]] * 2


def test_on_rank_0_works_once_and_tells_all(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "rank 0") == [(1, 42), (0, 42)]
    assert both(seen, "rank 0 returns none") == [None, None]
    assert both(seen, "rank 0's work cannot be asked of rank 1") == ["done on 0"] * 2


def elsewhere(status: int) -> tuple[type, str, int]:
    return ElsewhereError, str(ElsewhereError(status)), status


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("both fail", [(RunError, "both", None), elsewhere(EXIT_FAILED)]),
        ("rank 0 fails", [(RunError, "only 0", None), elsewhere(EXIT_FAILED)]),
        ("rank 1 fails", [(RunError, "only 1", None), elsewhere(EXIT_FAILED)]),
        ("rank 1 has a bad recipe", [(ConfigError, "bad", None), elsewhere(EXIT_BAD_CONFIG)]),
        ("rank 1 has a bug", [elsewhere(EXIT_FAILED), (ZeroDivisionError, "bug", None)]),
        ("rank 0's work fails", [(ConfigError, "bad", None), elsewhere(EXIT_BAD_CONFIG)]),
    ],
)
def test_a_failure_anywhere_is_everybodys_and_said_once(
    case: str, expected: list[Any], seen: list[dict[str, Any]]
) -> None:
    assert both(seen, case) == expected


def test_the_ranks_are_still_together_afterwards(seen: list[dict[str, Any]]) -> None:
    assert both(seen, "after all that") == [[0, 1]] * 2


# One process without a group


def test_alone_everything_is_its_own_answer() -> None:
    assert not dist.is_initialized()
    values = torch.tensor([1.0, 2.0])
    assert all_sum(values) is values
    assert gather("item") == ["item"]
    assert agree(lambda: 3) == [3]
    assert count_calls() == (1, 42)
    with pytest.raises(ConfigError, match="bad"):
        on_rank_0(fail(ConfigError("bad"), 0))


def test_a_lost_connection_is_told_from_a_bug() -> None:
    with pytest.raises(RunError, match=r"rank 3 lost its connection.*closed by peer.*checkpoint"):
        with naming_lost_ranks(3):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537]\nConnection closed by peer")
    for plain in (RuntimeError("shapes differ"), RunError("damaged"), ElsewhereError(1)):
        with pytest.raises(type(plain), match=str(plain)), naming_lost_ranks(0):
            raise plain
