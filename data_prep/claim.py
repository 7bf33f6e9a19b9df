"""Whose folder it is: finished, unfinished work of these settings, somebody else's, or in use."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.command import ConfigError
from data_prep.ranks import Ranks, each, on_rank_0
from data_prep.shards import MANIFEST, ShardReader, manifests

WORK = ".work"  # holds what a restart goes on from; there as long as the preparation is unfinished
WORK_FORMAT = 2  # of the files in there: what another release left is not gone on from
_LOCK = ".lock"


def is_prepared(folder: Path, settings: str) -> bool:
    """Whether the folder holds the finished shards of these settings.

    Raises:
        ConfigError: it holds finished shards of others.
        RunError: its manifest is damaged, or a shard is missing or cut.
    """
    if not (folder / MANIFEST).exists():
        return False
    if ShardReader(str(folder)).manifest.settings != settings:
        raise ConfigError(
            f"prep.output_dir={folder} holds shards of other text or settings, which are not "
            "overwritten; remove that folder or name another one"
        )
    return True


@contextlib.contextmanager
def locked(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other preparations out of the folder while any of these ranks lives.

    Every rank holds a share of the lock, because ranks can outlive a killed launcher and go on
    writing: a restart has to notice them.

    Raises:
        ConfigError: another preparation holds it, or there can be no such folder.
    """
    on_rank_0(ranks, lambda: _make(folder))
    with contextlib.ExitStack() as held:
        stream = each(ranks, lambda: held.enter_context(open(folder / _LOCK, "a+b")))

        def take(kind: int) -> None:
            try:
                fcntl.flock(stream, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another preparation is writing to prep.output_dir={folder}; wait for it, end "
                    "it, or name another folder"
                ) from error
            except OSError:
                pass  # a file system without locks: the user has to see to it that there is one

        def take_alone_then_share() -> None:
            take(fcntl.LOCK_EX)
            take(fcntl.LOCK_SH)

        on_rank_0(ranks, take_alone_then_share)
        each(ranks, lambda: take(fcntl.LOCK_SH))
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"prep.output_dir={folder} cannot be made ({error.strerror}), so there is nowhere to "
            "write shards; name a folder that can be"
        ) from error


def open_work(folder: Path, settings: str) -> None:
    """Make the work folder, or go on in the one that an unfinished preparation left.

    Unfinished work of other settings or releases is removed; files that no preparation began are
    not.

    Raises:
        ConfigError: there are tars in the folder, but no unfinished preparation.
    """
    work = folder / WORK
    mark = work / "settings"
    named = f"{settings} {WORK_FORMAT}"
    if mark.exists() and mark.read_text() == named:
        return
    finished = {shard.name for manifest in manifests(folder) for shard in manifest.shards}
    tars = sorted(itertools.chain(folder.glob("*.tar"), folder.glob("*.tar.partial")))
    tars = [path for path in tars if path.name not in finished]
    if tars and not work.exists():
        raise ConfigError(
            f"prep.output_dir={folder} holds {tars[0].name}, which no {MANIFEST} names, so it may "
            "be anything, and is not overwritten; remove it or name another folder"
        )
    mark.unlink(missing_ok=True)  # first: without it nothing that is left is ever gone on from
    for stale in tars:
        stale.unlink()
    if work.exists():  # last, because it says that the tars were ours
        shutil.rmtree(work)
    work.mkdir()
    mark.write_text(named)


def close_work(folder: Path) -> None:
    """Remove what only an unfinished preparation needs. Call it with the lock held.

    Whoever opened the lock meanwhile gets one on a removed file. That harms nobody, as they then
    find the manifest. The work folder goes last: while it is there, a restart cleans up.
    """
    (folder / _LOCK).unlink(missing_ok=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)
