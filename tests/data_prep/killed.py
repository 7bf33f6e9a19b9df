"""Prepares again and again, is killed at other moments, and compares what comes out in the end.

A program of its own, because it forks:
`python killed.py NUM_ROUNDS SEED RECIPE_JSON FOLDER [FIRST_INPUT_JSON]`. Every round kills a
preparation twice, each time with SIGKILL at a random one of its file operations, and then lets a
third one finish. Where a first input is named, these append to shards of it. Prints the moments
whose result differs; exit status 1 if there are any.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import rensa  # noqa: F401  (what a child imports it imports again in every round)
import webdataset  # noqa: F401

from data_prep import build_shards
from data_prep.build_shards import build
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.tokenizer import Tokenizer

NEVER = 1 << 30
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def prepare(prep: Prep, moment: int, append: bool) -> int:
    """How many file operations there were, in a process of its own; -1 if it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        seen = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in WATCHED and str(arguments[0]).startswith(str(prep.output_dir)):
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(watch)
        build(PrepRecipe(prep=prep), OneRank(), append=append)
        os.write(writing, str(seen).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    if os.WIFSIGNALED(status):
        return -1
    assert os.waitstatus_to_exitcode(status) == 0
    return int(answer)


def digest(folder: Path) -> str:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    content = [(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in names]
    return json.dumps(content)


def main() -> int:
    num_rounds, random_ = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    settings, folder = json.loads(sys.argv[3]), Path(sys.argv[4])
    tokenizer = Tokenizer(settings["tokenizer"])  # once: loading it touches nothing of the folder
    build_shards.Tokenizer = lambda source: tokenizer  # type: ignore[assignment,misc]
    append = len(sys.argv) > 5
    if append:
        first = {**settings, "input": json.loads(sys.argv[5])}
        prepare(Prep(**first, output_dir=str(folder / "first")), NEVER, append=False)

    def begin(name: str) -> Prep:
        if append:
            shutil.copytree(folder / "first", folder / name)
        return Prep(**settings, output_dir=str(folder / name))

    num_moments = prepare(begin("whole"), NEVER, append)
    expected = digest(folder / "whole")
    failures = []
    for number in range(num_rounds):
        prep = begin(f"{number}")
        moments = [random_.randrange(num_moments) for _ in range(2)]
        killed = [prepare(prep, moment, append) == -1 for moment in moments]
        prepare(prep, NEVER, append)
        if not killed[0] or digest(Path(str(prep.output_dir))) != expected:
            failures.append((moments, killed))
    print(f"{num_rounds} rounds, {num_moments} moments, differing: {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
