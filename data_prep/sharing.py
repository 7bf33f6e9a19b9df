"""Work that ranks share out among themselves as they go, so that none waits for a slow one.

Whoever creates a unit's file in the claims folder does the unit: one atomic operation of the file
system that all ranks share anyway, whichever MPI there is. Which rank does what changes no output.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.ranks import Ranks, each, on_rank_0

_FAILED = "failed"


def share(
    ranks: Ranks, claims: Path, sizes: Sequence[int], work: Callable[[int], None], what: str
) -> None:
    """Do `work(i)` once for each i, largest first, on whichever rank is free.

    Args:
        ranks: all of them call this.
        claims: a folder for this work alone; emptied first, as claims of the dead say nothing.
        sizes: of the units, in any measure.
        work: must do nothing where an earlier start has done the unit.
        what: for the progress bar.

    Raises:
        ConfigError or RunError: as `each`; the other ranks take no further unit.
    """

    def begin() -> None:
        shutil.rmtree(claims, ignore_errors=True)
        claims.mkdir(parents=True)

    on_rank_0(ranks, begin)
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))

    def work_off() -> None:
        with tqdm(
            total=len(order), desc=what, disable=None if ranks.rank == 0 else True
        ) as progress:
            try:
                for unit in _claimed(order, claims, ranks):
                    work(unit)
                    if not progress.disable:
                        progress.update(len(os.listdir(claims)) - progress.n)
            except BaseException:
                with contextlib.suppress(OSError):  # what failed first is what should be said
                    (claims / _FAILED).touch()
                raise

    each(ranks, work_off)


def _claimed(order: Sequence[int], claims: Path, ranks: Ranks) -> Iterator[int]:
    """The units that this rank gets: of its own share first, then what others have not begun."""
    own = order[ranks.rank :: ranks.size]
    rest = set(order) - set(own)
    turned = [*order[ranks.rank :], *order[: ranks.rank]]  # so that not all ask for the same one
    taken: set[str] = set()
    for unit in [*own, *(unit for unit in turned if unit in rest)]:
        if str(unit) in taken:
            continue
        try:
            os.close(os.open(claims / str(unit), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            taken = set(os.listdir(claims))  # one look shows all that is gone
            if _FAILED in taken:
                return
            continue
        if (claims / _FAILED).exists():
            return
        yield unit
