"""A small process beside each rank, which ends a rank that cannot end itself.

A stopped process, or C code that keeps Python's lock, runs no thread of the rank. The rank writes a
byte to this process's stdin now and then; when none comes for too long, the rank is killed. When
stdin is closed the rank has ended, and so does this.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

PATIENCE = 5.0  # seconds for a dump of the rank's stacks


def main(rank: str, limit: float, beat: float) -> None:
    """Watch the process that started this one.

    Args:
        rank: what it is called.
        limit: seconds without a byte after which it is killed.
        beat: seconds that this process waits at a time. It counts these and reads no clock: while
            a whole job is suspended, nobody is late.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, sent to its process group
    watched, silent = os.getppid(), 0.0
    while silent <= limit:
        if not select.select([0], [], [], beat)[0]:
            silent += beat
        elif os.read(0, 4096):
            silent = 0.0
        else:
            return
    sys.stderr.write(
        f"error: hang: {rank} gave no sign of life for {silent:.0f} s: it is stopped, or in code "
        "that keeps Python's lock; it is killed, and the same command goes on from the last "
        "checkpoint\n"
    )
    sys.stderr.flush()
    for number in (signal.SIGABRT, signal.SIGKILL):  # at the first one, faulthandler shows stacks
        if os.getppid() == watched:
            os.kill(watched, number)
            time.sleep(PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
