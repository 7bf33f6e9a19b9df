"""Ends a run in which nothing moves any more, and says whose fault it is.

Three things run beside each rank's work, none of which waits for a collective:

- the judge, a thread that touches nothing that can block: it counts for how long neither this rank
  nor any other has gone on, and ends the process;
- the messenger, a thread that tells the other ranks through torch's TCPStore where this one is, and
  asks where they are. The store lives in one process; where that is stopped, the messenger blocks,
  and the judge knows by its silence;
- the guard (pipeline/guard.py), a process for ranks whose threads do not run.

Time is counted in beats of these, not read from a clock: a job that is suspended and continued as a
whole, as some schedulers do, has not hung.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from data_prep.command import EXIT_FAILED
from pipeline import guard
from pipeline.progress import PROGRESS, whereabouts
from pipeline.topology import Topology, rendezvous

STDERR = 2  # the descriptor: what stands for sys.stderr may have none
LONGEST_BEAT = 5.0  # seconds
BEATS_TO_ANSWER = 3  # after which a rank, or the store, does not answer
BEATS_TO_LEAVE = 3  # in which all ranks have heard the verdict
GUARD_LIMITS = 2  # times hang_seconds: the ranks themselves, who know more, speak first
VERDICT = "watch/verdict"
NAMED = 4  # culprits in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank says of itself."""

    rank: int
    host: str
    process: int
    step: int
    count: int
    place: str
    line: str
    waits: bool
    beat: int

    def describe(self, *, answers: bool = True) -> str:
        """Who and where it is, in words."""
        doing = "waits for others" if self.waits else "is"
        doing = doing if answers else "does not answer and was last"
        return (
            f"rank {self.rank} ({self.host}, process {self.process}) {doing} in {self.place} "
            f"({self.line})"
        )


class Watchdog:
    """Watches this process from `start` to the end of the `with` block, if it is to.

    Args:
        output_dir: gets `hangs/`, with all ranks' stacks.
        hang_seconds: without any rank going on, after which all are ended; None watches nothing.
    """

    def __init__(self, output_dir: Path, hang_seconds: float | None) -> None:
        self._folder = output_dir / "hangs"
        self._limit = hang_seconds or 0.0
        self._beat = min(LONGEST_BEAT, self._limit / 10)
        self._quiet = 0.0  # seconds in which no rank went on
        self._leaving = threading.Event()
        self._guard: subprocess.Popen[bytes] | None = None
        self._messenger: _Messenger | None = None

    def start(self, topology: Topology) -> None:
        """Begin to watch; the ranks are connected and start at the same time."""
        if not self._limit:
            return
        faulthandler.enable(STDERR)
        self._main = threading.main_thread().ident or 0
        self._rank, self._host = topology.rank, platform.node()
        self._guard = subprocess.Popen(
            [
                *(sys.executable, "-S", "-E", guard.__file__),
                f"rank {self._rank} ({self._host}, process {os.getpid()})",
                *(str(GUARD_LIMITS * self._limit), str(self._beat)),
            ],
            stdin=subprocess.PIPE,
            env={},  # nobody takes it for a rank
        )
        self._messenger = _Messenger(topology, self._beat, self._record)
        for work in (self._judge, self._messenger.run):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def stop(self) -> None:
        """End the watch."""
        if self._messenger is not None:
            self._messenger.stopped.set()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._leaving.is_set():
            threading.Event().wait()  # what broke here broke by the hang: the judge ends it all
        self.stop()

    def _record(self, beat: int) -> Record:
        line, waits = whereabouts(self._main)
        return Record(
            rank=self._rank,
            host=self._host,
            process=os.getpid(),
            step=PROGRESS.step,
            count=PROGRESS.count,
            place=PROGRESS.describe(),
            line=line,
            waits=waits,
            beat=beat,
        )

    def _judge(self) -> None:
        """Until the watch is stopped or the process ended."""
        assert self._messenger is not None
        assert self._guard is not None
        assert self._guard.stdin is not None
        messenger, last = self._messenger, -1
        while not messenger.stopped.wait(self._beat):
            try:
                os.write(self._guard.stdin.fileno(), b".")
            except OSError:
                pass  # somebody killed it; the ranks still watch each other
            has_moved = PROGRESS.count != last or messenger.others_moved
            self._quiet = 0.0 if has_moved else self._quiet + self._beat
            last, messenger.others_moved = PROGRESS.count, False
            messenger.asks = self._quiet > self._limit / 2  # n ranks that ask of n: not for nothing
            messenger.silent += 1
            if messenger.verdict is None and self._quiet > self._limit:
                self._decide(messenger)
            if messenger.verdict is not None:
                self._end(messenger)

    def _decide(self, messenger: _Messenger) -> None:
        """Propose a verdict; the first one that the store is given holds for all ranks."""
        if messenger.silent <= BEATS_TO_ANSWER:
            if messenger.heard:  # else at the next beat
                messenger.proposal = self._explain(blame(messenger.heard, messenger.beat))
        else:
            mine = self._record(messenger.beat).describe()
            messenger.speaks = self._rank == 1  # rank 0 cannot, and nobody can settle who does
            messenger.verdict = self._explain(
                f"rank 0 ({messenger.address}) keeps the ranks' store and does not answer: it is "
                f"stopped, gone or out of reach; {mine}"
            )

    def _explain(self, culprits: str) -> str:
        return (
            f"error: hang: no rank went on for {self._quiet:.0f} s (watch.hang_seconds="
            f"{self._limit:g}): {culprits}; all ranks end, their stacks are in {self._folder}, and "
            "the same command goes on from the last checkpoint"
        )

    def _end(self, messenger: _Messenger) -> None:
        """Say what is the matter, leave the stacks, and go when all others have heard it."""
        self._leaving.set()
        if messenger.speaks:
            os.write(STDERR, f"{messenger.verdict}\n".encode())
        stacks = self._stacks(self._record(messenger.beat))
        os.write(STDERR, stacks)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"step-{PROGRESS.step:08d}-rank-{self._rank:05d}.txt"
            (self._folder / name).write_bytes(f"{messenger.verdict}\n\n".encode() + stacks)
        except OSError as error:
            os.write(STDERR, f"warning: {self._folder} cannot be written ({error})\n".encode())
        beats = BEATS_TO_LEAVE + (self._rank == 0)  # rank 0 takes the store along
        threading.Event().wait(beats * self._beat)
        os._exit(EXIT_FAILED)

    def _stacks(self, record: Record) -> bytes:
        with tempfile.TemporaryFile() as stream:
            stream.write(f"{record.describe()}\n".encode())
            stream.flush()
            faulthandler.dump_traceback(stream.fileno(), all_threads=True)
            stream.seek(0)
            return stream.read()


@dataclasses.dataclass
class _Heard:
    record: Record
    beat: int  # at which it was new


class _Messenger:
    """Exchanges records and the verdict with the other ranks, once a beat.

    The judge reads and sets the plain attributes; each is written by one thread at a time.
    """

    def __init__(self, topology: Topology, beat: float, record: Callable[[int], Record]) -> None:
        self._rank, self._seconds, self._record = topology.rank, beat, record
        host, port = rendezvous()
        self.address = f"{host}:{port}"
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=False, timeout=timedelta(seconds=BEATS_TO_ANSWER * beat + 1)
        )
        self._keys = [f"watch/{rank}" for rank in range(topology.world_size)]
        self._store.set(self._keys[self._rank], _as_json(record(0)))
        self.stopped = threading.Event()
        self.heard: dict[int, _Heard] = {}
        self.beat = self.silent = 0
        self.asks = self.others_moved = self.speaks = False
        self.proposal: str | None = None
        self.verdict: str | None = None

    def run(self) -> None:
        """Until the watch is stopped."""
        while not self.stopped.wait(self._seconds):
            try:
                self._exchange()
            except (dist.DistError, RuntimeError):
                continue  # the judge notes the silence
            self.silent = 0

    def _exchange(self) -> None:
        self.beat += 1
        self._store.set(self._keys[self._rank], _as_json(self._record(self.beat)))
        if self.asks:
            for raw in self._store.multi_get(self._keys):
                record = Record(**json.loads(raw))
                known = self.heard.get(record.rank)
                if known is None or known.record.beat != record.beat:
                    self.heard[record.rank] = _Heard(record, self.beat)
                if known is not None and known.record.count != record.count:
                    self.others_moved = True
        else:
            self.heard = {}
        if self.proposal is not None:
            held = self._store.compare_set(VERDICT, "", f"{self._rank} {self.proposal}")
        elif self._store.check([VERDICT]):
            held = self._store.get(VERDICT)
        else:
            return
        author, _, verdict = held.decode().partition(" ")
        self.speaks, self.verdict = int(author) == self._rank, verdict


def _as_json(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record))


def blame(heard: Mapping[int, _Heard], beat: int) -> str:
    """The ranks that the others wait for, in words.

    One that does not answer is to blame before one that is behind by steps and parts, and among
    equals one that works before one that waits.

    Args:
        heard: each rank's last record, and the beat at which it came.
        beat: now.
    """

    def answers(one: _Heard) -> bool:
        return beat - one.beat <= BEATS_TO_ANSWER

    def advance(one: _Heard) -> tuple[bool, int, int, bool]:
        return answers(one), one.record.step, one.record.count, one.record.waits

    least = min(map(advance, heard.values()))
    behind = [one for one in heard.values() if advance(one) == least]
    others = [one for one in heard.values() if advance(one) != least]
    named = "; ".join(one.record.describe(answers=answers(one)) for one in behind[:NAMED])
    if len(behind) > NAMED:
        named += f"; and {len(behind) - NAMED} more"
    if not others:
        return f"{named}, and no rank is behind the others" if len(behind) > 1 else named
    ahead = max(others, key=advance).record
    return f"{named}, while rank {ahead.rank} is in {ahead.place}"
