"""Damage of every kind to shards and checkpoints, and what their readers must say of it.

`python -m tests.soak.corruptions [--number N] [--seed S]` makes N of each and ends with status 1
at the first one that is not named. tests/soak/test_corruption.py makes a few.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.build_shards import build
from data_prep.command import ConfigError, RunError
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import MANIFEST, ShardReader
from data_prep.verify import find_faults
from pipeline.checkpoint import MARKER, Checkpoints, State, newest_state, read_state, tag_of
from pipeline.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
STEPS = (1, 2)
Damage = Callable[[Path, random.Random], str]


# What happens to files: each changes at least one byte, and says what it did


def flip(path: Path, draw: random.Random) -> str:
    """One bit."""
    data = bytearray(path.read_bytes())
    index, bit = draw.randrange(len(data)), draw.randrange(8)
    data[index] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {index} flipped"


def zero(path: Path, draw: random.Random) -> str:
    """A stretch of a disk that was never written."""
    data = bytearray(path.read_bytes())
    start = draw.choice([index for index in range(len(data)) if data[index]])
    stop = min(len(data), start + draw.choice([1, 16, 512, 4096]))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return f"bytes {start} to {stop} zeroed"


def scramble(path: Path, draw: random.Random) -> str:
    """A stretch of something else."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice([1, 16, 512, 4096]))
    data[start:stop] = bytes(byte ^ draw.randrange(1, 256) for byte in data[start:stop])
    path.write_bytes(data)
    return f"bytes {start} to {stop} scrambled"


def truncate(path: Path, draw: random.Random) -> str:
    """An end that is missing."""
    data = path.read_bytes()
    size = draw.choice([0, len(data) - 1, draw.randrange(len(data))])
    path.write_bytes(data[:size])
    return f"cut from {len(data)} to {size} bytes"


def extend(path: Path, draw: random.Random) -> str:
    """Something behind the end."""
    size = draw.choice([1, 512, 10240])
    with open(path, "ab") as stream:
        stream.write(draw.randbytes(size))
    return f"{size} bytes added"


def delete(path: Path, draw: random.Random) -> str:
    """No file."""
    path.unlink()
    return "deleted"


def become_folder(path: Path, draw: random.Random) -> str:
    """A folder in its place."""
    path.unlink()
    path.mkdir()
    return "made a folder"


def swap(path: Path, draw: random.Random) -> str:
    """The content of another file of the folder that differs."""
    content = path.read_bytes()
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file()]
    other = draw.choice([other for other in others if other.read_bytes() != content])
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped with {other.name}"


DAMAGES: tuple[Damage, ...] = (
    flip, zero, scramble, truncate, extend, delete, become_folder, swap
)  # fmt: skip


# What is damaged


def make_shards(folder: Path) -> Path:
    """Small shards of several files and blocks."""
    prep = Prep(
        input=[str(ROOT / "recipes" / "demo_text" / "s*.jsonl")],
        tokenizer=str(ROOT / "models" / "pocket-teacher"),
        output_dir=str(folder),
        seq_len=64,
        heldout_rows=2,
        rows_per_block=8,
        blocks_per_shard=2,
    )
    build(PrepRecipe(prep=prep), OneRank())
    return folder


class _Files:
    """Stands in for an engine: two files of a checkpoint, of bytes that say where they are from."""

    def snapshot(self, tag: str) -> dict[str, memoryview]:
        names = ("model.pt", "optimizer.pt")
        return {n: memoryview(random.Random(f"{tag} {n}").randbytes(20_000)) for n in names}


def make_checkpoints(run: Path) -> Path:
    """A run's folder of two checkpoints; what their files hold does not matter here."""
    topology = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1)
    checkpoints = Checkpoints(run, topology, keep=len(STEPS))
    for step in STEPS:
        identity = {"seed": 1, "train.max_steps": 9}
        state = State(step=step, tokens=step * 10, world_size=1, identity=identity)
        checkpoints.save(_Files(), state)  # type: ignore[arg-type]
        checkpoints.finish()
    return checkpoints.folder


# What readers must say


def shard_complaint(whole: Path, shards: Path, victims: Sequence[str]) -> str | None:
    """What is wrong with how damage to files of `shards` is met; None where nothing is.

    `verify` must name them all, unless it is the manifest and says what it said. Reading every
    block must end in a RunError or ConfigError that names one, or give what the whole folder gives.
    """
    faults = "; ".join(find_faults(shards))
    for victim in victims:
        if victim not in faults and not (victim == MANIFEST and _same_manifest(whole, shards)):
            return f"verify does not name {victim}: {faults}"
    try:
        read = list(_blocks(shards))
    except (RunError, ConfigError) as error:
        named = any(victim in str(error) for victim in victims)
        return None if named else f"the reader does not name {victims}: {error}"
    for one, other in zip(read, _blocks(whole), strict=True):
        if not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)):
            return "the reader gives other rows"
    return None


def _same_manifest(one: Path, other: Path) -> bool:
    return ShardReader(str(one)).manifest == ShardReader(str(other)).manifest


def _blocks(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    reader = ShardReader(str(folder))
    for language in (None, *sorted(reader.manifest.heldout_rows)):
        for index in range(len(reader.blocks(language))):
            yield reader.read_block(index, language=language)


def checkpoint_complaint(whole: Path, folder: Path, tag: str, victims: Sequence[str]) -> str | None:
    """What is wrong with how damage to files of the newest checkpoint is met.

    It must be refused by its name and a file's, unless it is the marker and says what it said, and
    the one before must take its place.
    """
    try:
        state = read_state(folder / tag)
    except RunError as error:
        names = [tag] if MARKER in victims else victims
        if tag not in str(error) or not any(name in str(error) for name in names):
            return f"read_state does not name {tag} and {victims}: {error}"
    else:
        if victims == [MARKER] and state == read_state(whole / tag):
            return None
        return f"read_state takes {tag} although {victims} are damaged"
    with contextlib.redirect_stderr(io.StringIO()):  # where it names what it passes over
        newest = newest_state(folder)
    if newest is None or newest.step != STEPS[0]:
        return f"newest_state gives {newest}, not step {STEPS[0]}"
    return None


# Campaigns


def damage_shards(whole: Path, place: Path, number: int, seed: int) -> Iterator[str]:
    """Complaints about `number` damages of each kind, each to a fresh copy of `whole`."""
    names = sorted(path.name for path in whole.iterdir() if path.is_file())
    for damage, draw, target in _damages(names, number, seed, always=MANIFEST):
        copy = Path(shutil.copytree(whole, place / "copy"))
        done = damage(copy / target, draw)
        victims = [target, *(name for name in names if name in done)]
        # Without the manifest nothing is known of the others.
        complaint = shard_complaint(whole, copy, [MANIFEST] if MANIFEST in victims else victims)
        shutil.rmtree(copy)
        if complaint:
            yield f"{target}, {done}: {complaint}"


def damage_checkpoints(whole: Path, place: Path, number: int, seed: int) -> Iterator[str]:
    """Complaints about `number` damages of each kind to the newest of `whole`'s checkpoints."""
    tag = tag_of(STEPS[-1])
    names = sorted(path.name for path in (whole / tag).iterdir())
    for damage, draw, target in _damages(names, number, seed, always=MARKER):
        copy = Path(shutil.copytree(whole, place / "copy"))
        done = damage(copy / tag / target, draw)
        victims = [target, *(name for name in names if name in done)]
        complaint = checkpoint_complaint(whole, copy, tag, victims)
        shutil.rmtree(copy)
        if complaint:
            yield f"{tag}/{target}, {done}: {complaint}"


def _damages(
    names: list[str], number: int, seed: int, *, always: str
) -> Iterator[tuple[Damage, random.Random, str]]:
    """`number` of each kind; every fourth meets `always`, which says what all others are."""
    for damage in DAMAGES:
        for count in range(number):
            draw = random.Random(f"{seed} {damage.__name__} {count}")
            yield damage, draw, always if count % 4 == 0 else draw.choice(names)


def main() -> int:
    """All campaigns; prints what was not met as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.corruptions", description=__doc__)
    parser.add_argument("--number", type=int, default=100, help="of each kind of damage")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, campaign, whole in (
            ("shards", damage_shards, make_shards(place / "shards")),
            ("checkpoints", damage_checkpoints, make_checkpoints(place / "run")),
        ):
            for complaint in campaign(whole, place, options.number, options.seed):
                print(f"{name}: {complaint}", file=sys.stderr)
                status = 1
            print(f"{name}: {options.number} of each of {len(DAMAGES)} damages made", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
