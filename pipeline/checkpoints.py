"""The checkpoints of a run: listed, verified, pruned or converted.

`python -m pipeline.checkpoints RUN [--verify | --prune [--keep N] | --convert STEP --to DIR]`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.command import (
    EXIT_FAILED,
    EXIT_FINISHED,
    ConfigError,
    OptionParser,
    RunError,
    run_command,
)
from pipeline.checkpoint import (
    LATEST,
    STAGE_KEY,
    Marker,
    TornError,
    checkpoint_folders,
    find_faults,
    read_marker,
    read_state,
    remove,
    step_of,
    superseded,
    tag_of,
)
from pipeline.config import load_recipe
from pipeline.engine import convert_to_universal


def main(argv: Sequence[str] | None = None) -> int:
    """List the checkpoints of a run, or do what an option says."""
    parser = OptionParser(prog="python -m pipeline.checkpoints", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a training run")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--verify", action="store_true", help="read every file; exit status 1 if one is damaged"
    )
    actions.add_argument(
        "--prune",
        action="store_true",
        help="delete whole ones that the recipe's keep_checkpoints and keep_every do not keep",
    )
    actions.add_argument(
        "--convert", type=int, metavar="STEP", help="write one that any ranks and ZeRO stage load"
    )
    parser.add_argument("--keep", type=int, metavar="N", help="instead of keep_checkpoints")
    parser.add_argument("--to", type=Path, metavar="DIR", help="new folder for --convert")
    options = parser.parse_args(argv)
    folder: Path = options.run / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"{options.run} has no checkpoints; name the output_dir of a run")
    if options.keep is not None and not options.prune:
        raise ConfigError(f"--keep {options.keep} is of --prune only; add that, or leave it out")
    if (options.to is None) is not (options.convert is None):
        raise ConfigError("--convert STEP and --to DIR go together: which one, and where to")
    if options.convert is not None:
        convert(folder, options.convert, options.to)
        return EXIT_FINISHED
    if options.prune:
        prune(options.run, options.keep)
        return EXIT_FINISHED
    found = [look_at(path, checksums=options.verify) for path in checkpoint_folders(folder)]
    if options.verify:
        return verify(folder, found)
    latest = latest_of(folder)
    for line in table(found, latest):
        print(line)
    return EXIT_FINISHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint's folder and its condition: whole where `marker` is there and `faults` empty."""

    path: Path
    marker: Marker | None
    faults: list[str]
    is_torn: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether a run would go on from it."""
        return self.marker is not None and not self.faults

    @property
    def condition(self) -> str:
        """In a word."""
        if self.is_torn:
            return "torn"  # while it is written, or since a kill
        return "whole" if self.is_whole else "damaged"


def look_at(path: Path, *, checksums: bool) -> Found:
    """The condition of a checkpoint.

    Args:
        path: its folder.
        checksums: read the files, and do not only look at their sizes.
    """
    try:
        marker = read_marker(path)
    except RunError as error:
        return Found(
            path=path, marker=None, faults=[str(error)], is_torn=isinstance(error, TornError)
        )
    return Found(path=path, marker=marker, faults=find_faults(path, marker, checksums=checksums))


def latest_of(folder: Path) -> str:
    """The checkpoint that `latest` names; empty where it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    return ""


def table(found: Sequence[Found], latest: str) -> Iterator[str]:
    """A line for each checkpoint, after a head.

    `write s` is from the start of the save to the marker, of which training waited `loop s`.
    """
    yield (
        f"{'step':>9}  {'saved at':<25}  {'ranks':>5}  {'stage':>5}  {'MB':>9}  {'write s':>7}  "
        f"{'loop s':>6}  condition"
    )
    for one in found:
        at, ranks, stage, seconds, in_loop = "-", "-", "-", "-", "-"
        if one.marker is not None:
            state, saved = one.marker.state, one.marker.saved
            ranks, stage = str(state.world_size), str(state.identity.get(STAGE_KEY, "-"))
            at = saved.get("at", "-")
            seconds, in_loop = (
                f"{saved[key]:.2f}" if key in saved else "-"
                for key in ("seconds", "seconds_in_loop")
            )
        size = sum(file.stat().st_size for file in one.path.glob("*")) / 1e6
        mark = ", latest" if one.path.name == latest else ""
        yield (
            f"{step_of(one.path):>9}  {at:<25}  {ranks:>5}  {stage:>5}  {size:>9.1f}  "
            f"{seconds:>7}  {in_loop:>6}  {one.condition}{mark}"
        )


def verify(folder: Path, found: Sequence[Found]) -> int:
    """Print what is broken; a torn checkpoint is not: nothing goes on from it.

    Returns:
        The exit status.
    """
    whole = [one.path.name for one in found if one.is_whole]
    faults = [fault for one in found if not one.is_torn for fault in one.faults]
    latest = latest_of(folder)
    if latest not in whole and (latest or whole):
        faults.append(f"{folder / LATEST} names {latest or 'nothing'}, which is not a whole one")
    for fault in faults:
        print(fault, file=sys.stderr)
    for one in found:
        if one.is_torn:
            print(f"note: {one.faults[0]}; a resume passes it over")
    print(f"{folder}: {len(whole)} of {len(found)} checkpoints are whole, {len(faults)} faults")
    return EXIT_FAILED if faults else EXIT_FINISHED


def prune(run: Path, keep: int | None) -> None:
    """Delete the whole checkpoints that are not kept; what is damaged neither counts nor goes.

    Args:
        run: the run's folder.
        keep: how many of the newest stay; None is what the run's recipe says.

    Raises:
        ConfigError: a process is training there.
        RunError: a file cannot be deleted.
    """
    recipe, _ = load_recipe(["--config", str(run / "config.yaml")])
    keep = recipe.train.keep_checkpoints if keep is None else keep
    if keep < 1:
        raise ConfigError(f"--keep {keep} would leave nothing to go on from; use 1 or more")
    with _lock(run):
        found = [look_at(p, checksums=True) for p in checkpoint_folders(run / "checkpoints")]
        whole = [one.path for one in found if one.is_whole]
        for path in superseded(whole, keep, recipe.train.keep_every):
            try:
                remove(path)
            except OSError as error:
                raise RunError(f"{path} cannot be deleted ({error.strerror})") from error
            print(f"deleted {path}")


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Keep a run from being trained meanwhile."""
    with open(run / ".lock", "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"a process is training in {run}, and prunes by itself; wait for its end"
            ) from error
        yield


def convert(folder: Path, step: int, destination: Path) -> None:
    """Write a checkpoint in DeepSpeed's universal form, as DESTINATION/step-….

    Args:
        folder: the run's checkpoints.
        step: the checkpoint's.
        destination: a folder that is new or empty.

    Raises:
        ConfigError: there is no such checkpoint, or the folder is in use.
        RunError: the checkpoint is damaged.
    """
    path = folder / tag_of(step)
    if not path.is_dir():
        known = ", ".join(str(step_of(other)) for other in checkpoint_folders(folder))
        raise ConfigError(f"--convert {step} is not the step of a checkpoint; known are {known}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"--to {destination} is in use, and nothing is overwritten; name another")
    read_state(path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        convert_to_universal(folder, path.name, partial)
        os.replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(destination / path.name)


if __name__ == "__main__":
    run_command(main)
