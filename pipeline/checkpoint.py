"""Checkpoints that count once their marker is written, and the choice of the one to resume from.

`OUTPUT_DIR/checkpoints/step-00000100/` holds DeepSpeed's shards and `COMPLETE`, a JSON written last
with every file's size and sha256 and the run's state; `latest` names the newest and changes after.
The state is small since the rest follows from integers: the data position and every rank's random
numbers are functions of the step and the seed. Training waits for a copy in memory only: a thread
of each rank writes it, reads it back and compares.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.command import ConfigError, RunError, one_line
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
    "data.cache_gb train.save_every train.keep_checkpoints train.keep_every train.max_failed_saves "
    "train.log_every train.eval_every watch.hang_seconds watch.straggler_percent "
    "watch.check_corruption_every".split()
)
STAGE_KEY = "deepspeed.zero_optimization.stage"
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
    """The checkpoints of one run, of which at most one is being written.

    `save` takes a copy and returns; the rest happens in a thread of each rank, which calls no
    collective that could meet one of the training. Every rank asks `is_busy` between steps; once
    all are idle, all call `settle`, first to have rank 0 publish the parts that are on disk, then
    to take note that it did.

    Args:
        output_dir: the run's folder.
        topology: of the ranks that write and read together.
        keep: complete checkpoints that are kept.
        keep_every: those of its multiples are kept besides; 0 is none.
        max_failed_saves: failures in a row that end the run.
    """

    def __init__(
        self,
        output_dir: Path,
        topology: Topology,
        *,
        keep: int,
        keep_every: int = 0,
        max_failed_saves: int = 3,
    ) -> None:
        self.folder = output_dir / "checkpoints"
        self.failed_saves = 0  # in a row, up to the last one that was settled
        self.on_failure: Callable[[int], object] = lambda failed_saves: None
        self._topology = topology
        self._keep = keep
        self._keep_every = keep_every
        self._max_failed_saves = max_failed_saves
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: _Save | None = None
        self._reason = ""  # of the last failure

    def newest(self) -> State | None:
        """`newest_state`, looked for by rank 0."""
        return on_rank_0(lambda: newest_state(self.folder))

    def save(self, engine: Engine, state: State) -> None:
        """Begin a checkpoint, after the one before is done; training may go on at once.

        Raises:
            RunError: it cannot be written, for the last time that max_failed_saves allows.
        """
        started = time.monotonic()
        self.wait()
        self._refuse_after(self._max_failed_saves)
        path = self.folder / tag_of(state.step)
        files = engine.snapshot(path.name)
        self._save = _Save(
            path=path,
            state=state,
            started=started,
            seconds_in_loop=time.monotonic() - started,
            work=self._thread.submit(_write, path, files, self._topology.world_size),
        )

    @property
    def is_busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and not self._save.work.done()

    def settle(self) -> None:
        """Move the save on that no rank works on any more; called by all ranks at once.

        Raises:
            RunError: it failed, for the last time that max_failed_saves allows.
        """
        self._advance()
        self._refuse_after(self._max_failed_saves)

    def wait(self) -> None:
        """Until the save that is under way is done, well or not; called by all ranks at once."""
        while self._save is not None:
            wait_for([self._save.work])
            self._advance()

    def finish(self) -> None:
        """Until the last save counts; called by all ranks at once.

        Raises:
            RunError: it failed.
        """
        self.wait()
        self._refuse_after(1)

    def _advance(self) -> None:
        save = self._save
        if save is None:
            return
        outcomes = agree(save.outcome)
        failures = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason]
        if failures:
            self._save = None
            self._fail(save.path, failures[0])
        elif not save.is_written:
            files = {name: facts for part, _ in outcomes for name, facts in part.items()}
            work = self._thread.submit(self._publish, save, files)
            self._save = dataclasses.replace(save, is_written=True, work=work)
        else:
            self._save = None
            self.failed_saves = 0

    @property
    def _is_first(self) -> bool:
        return self._topology.rank == 0

    def _fail(self, path: Path, reason: str) -> None:
        self.failed_saves += 1
        self._reason = f"checkpoint {path} cannot be written ({reason})"
        if self._is_first and not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)  # a full disk is not left fuller
        if self._is_first:
            print(
                f"warning: {self._reason}; those before are as they were, and this is failure "
                f"{self.failed_saves} of the {self._max_failed_saves} in a row "
                "(train.max_failed_saves) that end the run: make room",
                file=sys.stderr,
                flush=True,
            )
        self.on_failure(self.failed_saves)

    def _refuse_after(self, failed_saves: int) -> None:
        if self.failed_saves >= failed_saves:
            on_rank_0(self._refuse)

    def _refuse(self) -> None:
        raise RunError(
            f"{self._reason}; failures in a row: {self.failed_saves}; those before are as they "
            "were: make room and start the same command again"
        )

    def _publish(self, save: _Save, files: dict[str, Any]) -> dict[str, Any]:
        """With all ranks' files on disk: rank 0 says so, and removes what is no longer kept."""
        if not self._is_first:
            return {}
        for file in save.path.iterdir():  # of a torn attempt at the same step
            if file.name not in files:
                file.unlink()
        saved = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - save.started, 3),
            "seconds_in_loop": round(save.seconds_in_loop, 3),
        }
        body = {"state": dataclasses.asdict(save.state), "saved": saved, "files": files}
        write_durably(save.path / MARKER, json.dumps({**body, "digest": _digest(body)}, indent=1))
        write_durably(self.folder / LATEST, save.path.name)
        # A later one is damaged, or this run would have gone on from it: it keeps nobody's place.
        older = [path for path in complete(self.folder) if step_of(path) <= save.state.step]
        for path in superseded(older, self._keep, self._keep_every):
            try:
                remove(path)
            except OSError as error:
                print(
                    f"warning: checkpoint {path} is no longer kept but cannot be removed "
                    f"({error.strerror}); remove it by hand",
                    file=sys.stderr,
                )
        return {}

    def restore(self, engine: Engine, state: State, *, foreign: bool) -> None:
        """Load what `newest` gave.

        Args:
            engine: new; where `foreign` is set, made with load_universal.
            state: the checkpoint's.
            foreign: what `is_foreign` says of it.
        """
        if not foreign:
            engine.load(self.folder, tag_of(state.step))
            return
        converted = self.folder / ".universal"
        on_rank_0(lambda: convert_to_universal(self.folder, tag_of(state.step), converted))
        engine.load(converted, tag_of(state.step))
        on_rank_0(lambda: shutil.rmtree(converted))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Save:
    """A save under way. `work` is this rank's: first its files, then, on rank 0, the marker."""

    path: Path
    state: State
    started: float  # by time.monotonic
    seconds_in_loop: float  # that training waited
    work: Future[dict[str, Any]]
    is_written: bool = False

    def outcome(self) -> tuple[dict[str, Any], str]:
        """What the work gave, and why it failed; the latter is empty where it did not."""
        try:
            return self.work.result(), ""
        except (OSError, RunError) as error:
            failure = error.__cause__ or error if isinstance(error, RunError) else error
            return {}, getattr(failure, "strerror", None) or one_line(failure)


def _write(path: Path, files: Mapping[str, memoryview], num_ranks: int) -> dict[str, Any]:
    """Put this rank's files on disk; returns what the marker says of each.

    Args:
        path: the checkpoint's folder.
        files: contents by name.
        num_ranks: that write about as much, at the same time.

    Raises:
        OSError: one cannot be written, or reads back as something else.
    """
    path.mkdir(parents=True, exist_ok=True)
    needed = num_ranks * sum(content.nbytes for content in files.values())
    if shutil.disk_usage(path).free < needed:  # not filled, for the metrics go there meanwhile
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (path / MARKER).unlink(missing_ok=True)  # of a damaged one of the same step
    return {name: _write_file(path / name, content) for name, content in files.items()}


def _write_file(file: Path, content: memoryview) -> dict[str, Any]:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from where it lies, not from memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    sha256 = hashlib.sha256(content).hexdigest()
    if _sha256(file) != sha256:
        raise OSError(errno.EIO, f"{file.name} reads back as something else than was written")
    return {"bytes": content.nbytes, "sha256": sha256}


def is_foreign(saved: State, now: State) -> bool:
    """Whether other ranks or another ZeRO stage cut its shards, so that they must be cut anew."""
    return saved.world_size != now.world_size or (
        saved.identity.get(STAGE_KEY) != now.identity.get(STAGE_KEY)
    )


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders of checkpoints, whatever their condition, in the order of their steps."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=step_of)


def complete(folder: Path) -> list[Path]:
    """Those of `checkpoint_folders` that have their marker."""
    return [path for path in checkpoint_folders(folder) if (path / MARKER).exists()]


def superseded(whole: Sequence[Path], keep: int, keep_every: int) -> list[Path]:
    """Which of the whole checkpoints, in the order of their steps, are not kept.

    Args:
        whole: their folders.
        keep: how many of the last ones stay.
        keep_every: those of its multiples stay besides; 0 is none.
    """
    return [path for path in whole[:-keep] if not keep_every or step_of(path) % keep_every]


def remove(path: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves nothing that looks whole."""
    (path / MARKER).unlink()
    shutil.rmtree(path)


def newest_state(folder: Path) -> State | None:
    """The newest whole checkpoint; newer torn or damaged ones are named and passed over."""
    for path in reversed(checkpoint_folders(folder)):
        try:
            return read_state(path)
        except RunError as error:
            print(f"warning: {error}; it is passed over", file=sys.stderr)
    return None


@dataclasses.dataclass(frozen=True)
class Marker:
    """What COMPLETE says: the state, of each file its bytes and sha256, and of the save its time.

    `saved` has `at` (UTC), `seconds` and `seconds_in_loop`; it is empty in older checkpoints.
    """

    state: State
    files: dict[str, dict[str, Any]]
    saved: dict[str, Any]


class TornError(RunError):
    """A checkpoint that was never finished."""


def read_marker(path: Path) -> Marker:
    """The marker of a checkpoint folder.

    Raises:
        TornError: there is none.
        RunError: it is not as it was written.
    """
    try:
        body = json.loads((path / MARKER).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        marker = Marker(State(**body["state"]), body["files"], body.get("saved", {}))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TornError(f"checkpoint {path} has no {MARKER}: it was never finished") from error
    except OSError as error:
        raise RunError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"checkpoint {path} is damaged: {MARKER} is unreadable ({error})") from error
    if digest != _digest(body):
        raise RunError(f"checkpoint {path} is damaged: {MARKER} does not match its digest")
    return marker


def find_faults(path: Path, marker: Marker, *, checksums: bool = True) -> list[str]:
    """A line for each file of a checkpoint that is not as its marker says.

    Args:
        path: the checkpoint's folder.
        marker: from there.
        checksums: read the files, and do not only look at their sizes.
    """
    faults = []
    for name, facts in marker.files.items():
        file = path / name
        try:
            is_whole = file.stat().st_size == facts["bytes"] and (
                not checksums or _sha256(file) == facts["sha256"]
            )
            fault = "" if is_whole else "is not what was written"
        except FileNotFoundError:
            fault = "is missing"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            faults.append(f"checkpoint {path} is damaged: {name} {fault}")
    return faults


def read_state(path: Path) -> State:
    """The state of a checkpoint folder, after checking every file against the marker.

    Raises:
        RunError: there is no marker, or something is not as it was written.
    """
    marker = read_marker(path)
    if faults := find_faults(path, marker):
        raise RunError(faults[0])
    return marker.state


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
