"""Checkpoints that count once their marker is written, and the choice of the one to resume from.

`OUTPUT_DIR/checkpoints/step-00000100/` holds DeepSpeed's shards and `COMPLETE`, a JSON written last
with every file's size and sha256 and the run's state; `latest` names the newest and changes after.
The state is small since the rest follows from integers: the data position and every rank's random
numbers are functions of the step and the seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.command import ConfigError, RunError
from data_prep.durable import write_durably
from pipeline.collectives import agree, on_rank_0
from pipeline.config import flatten
from pipeline.engine import Engine, convert_to_universal
from pipeline.topology import Topology

MARKER = "COMPLETE"
LATEST = "latest"
# Keys that cannot change what is learned: where things lie, and how often they are written down.
FREE_KEYS = frozenset(
    "output_dir students data.shards data.prepare data.row_log data.verify data.cache_dir "
    "data.cache_gb train.save_every train.keep_checkpoints train.log_every train.eval_every "
    "watch.hang_seconds watch.straggler_percent watch.check_corruption_every".split()
)
SHARDS_KEY = "data.shards (content)"  # the digest of the manifest that a run reads by

# Sections of the ds_config that repeat what the recipe decides, or only watch.
FREE_DS_SECTIONS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "gradient_clipping optimizer steps_per_print wall_clock_breakdown comms_logger "
    "flops_profiler memory_breakdown dump_state".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint knows besides DeepSpeed's files.

    Args:
        step: optimizer steps done.
        tokens: real tokens trained on.
        world_size: ranks that wrote the files.
        identity: dotted keys of the recipe, the ds_config and the digest of the shards.
        recent_losses: of the steps before, by which the next one's loss is judged.
    """

    step: int
    tokens: int
    world_size: int
    identity: dict[str, Any]
    recent_losses: list[float] = dataclasses.field(default_factory=list)


def tag_of(step: int) -> str:
    """A checkpoint's folder name."""
    return f"step-{step:08d}"


def identity(recipe: Any, ds_policy: Mapping[str, Any], shards_digest: str) -> dict[str, Any]:
    """What a run is, as dotted keys: two runs of equal identity learn the same."""
    keys = {k: v for k, v in flatten(recipe).items() if not k.startswith("prep.")}
    policy = {k: v for k, v in ds_policy.items() if k not in FREE_DS_SECTIONS}
    keys |= {f"deepspeed.{k}": v for k, v in flatten(policy).items()}
    keys[SHARDS_KEY] = shards_digest
    plain: dict[str, Any] = json.loads(
        json.dumps({k: keys[k] for k in sorted(keys.keys() - FREE_KEYS)})
    )
    return plain


class Checkpoints:
    """The checkpoints of one run.

    Args:
        output_dir: the run's folder.
        topology: of the ranks that write and read together.
        keep: complete checkpoints that are kept.
    """

    def __init__(self, output_dir: Path, topology: Topology, *, keep: int) -> None:
        self.folder = output_dir / "checkpoints"
        self._topology = topology
        self._keep = keep

    def newest(self) -> State | None:
        """`newest_state`, looked for by rank 0."""
        return on_rank_0(lambda: newest_state(self.folder))

    def save(self, engine: Engine, state: State) -> None:
        """Write a checkpoint; when this returns on any rank it counts on all.

        Raises:
            RunError: a file could not be written.
        """
        path = self.folder / tag_of(state.step)
        try:
            self._write(engine, state, path)
        except OSError as error:
            raise RunError(
                f"checkpoint {path} cannot be written ({error.strerror or error}); the one before "
                "is whole: make room and start the same command again"
            ) from error

    def _write(self, engine: Engine, state: State, path: Path) -> None:
        on_rank_0(lambda: self._clear(path))
        engine.save(self.folder, path.name)
        written = sorted(p for p in path.iterdir() if p.is_file())
        # Ranks share the hashing; each syncs what it hashes before the marker may say so.
        mine = written[self._topology.rank :: self._topology.world_size]
        parts = agree(lambda: {p.name: _sync_and_describe(p) for p in mine})
        files = {name: facts for part in parts for name, facts in part.items()}
        on_rank_0(lambda: self._finish(path, state, files))

    def _clear(self, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)  # a torn attempt at the same step

    def _finish(self, path: Path, state: State, files: dict[str, Any]) -> None:
        body = {"state": dataclasses.asdict(state), "files": files}
        write_durably(path / MARKER, json.dumps({**body, "digest": _digest(body)}, indent=1))
        write_durably(self.folder / LATEST, path.name)
        complete = sorted(p.parent for p in self.folder.glob(f"step-*/{MARKER}"))
        # A later one is damaged, or this run would have gone on from it: it keeps nobody's place.
        for old in [p for p in complete if p <= path][: -self._keep]:
            (old / MARKER).unlink()  # first, so that a kill leaves no half with a marker
            shutil.rmtree(old)

    def is_foreign(self, state: State) -> bool:
        """Whether another number of ranks wrote it, so that its shards must be cut anew."""
        return state.world_size != self._topology.world_size

    def restore(self, engine: Engine, state: State) -> None:
        """Load what `newest` gave; an engine for a foreign one is made with load_universal."""
        if not self.is_foreign(state):
            engine.load(self.folder, tag_of(state.step))
            return
        converted = self.folder / ".universal"
        on_rank_0(lambda: convert_to_universal(self.folder, tag_of(state.step), converted))
        engine.load(converted, tag_of(state.step))
        on_rank_0(lambda: shutil.rmtree(converted))


def newest_state(folder: Path) -> State | None:
    """The newest whole checkpoint; newer torn or damaged ones are named and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read_state(path)
        except RunError as error:
            print(f"warning: {error}; it is passed over", file=sys.stderr)
    return None


def read_state(path: Path) -> State:
    """The state of a checkpoint folder, after checking every file against the marker.

    Raises:
        RunError: there is no marker, or something is not as it was written.
    """
    try:
        body = json.loads((path / MARKER).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        files, state = body["files"], State(**body["state"])
    except FileNotFoundError as error:
        raise RunError(f"checkpoint {path} has no {MARKER}: it was never finished") from error
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path} is damaged: {MARKER} is unreadable ({error})") from error
    if digest != _digest(body):
        raise RunError(f"checkpoint {path} is damaged: {MARKER} does not match its digest")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise RunError(f"checkpoint {path} is damaged: {name} is not what was written")
    return state


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: list[str]) -> None:
    """Refuse to resume as another run than the checkpoint's.

    Raises:
        ConfigError: keys differ that --allow_change does not name.
    """
    changed = [
        key
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key) and not any(_names(a, key) for a in allowed)
    ]
    if changed:
        listed = ", ".join(
            f"{key} (was {saved.get(key)!r}, is {now.get(key)!r})" for key in changed
        )
        raise ConfigError(
            f"the checkpoint was made with other values of {listed}, so the run would not be the "
            "one that started; restore them, use another output_dir, or pass "
            + " ".join(f"--allow_change {key!r}" for key in changed)
        )


def shards_digest_of(saved: State, allowed: list[str]) -> str | None:
    """The manifest by which a run goes on; None, the newest, where --allow_change says so."""
    if any(_names(a, SHARDS_KEY) for a in allowed):
        return None
    digest: str | None = saved.identity.get(SHARDS_KEY)
    return digest


def _names(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def _sync_and_describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
