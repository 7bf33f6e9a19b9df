"""C code, compiled for this very processor at first use.

That takes a second at most, so nothing is kept that could be stale, or of another host's processor.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

REQUESTS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


class UncompiledError(Exception):
    """Why code cannot be compiled or loaded here."""


def compile_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library that `source` compiles to.

    Args:
        source: a C file.
        flags: of the compiler; those that make a shared library are added.

    Raises:
        UncompiledError: there is no compiler, it does not compile the file, or the result does not
            load.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise UncompiledError("there is no C compiler, cc or what CC names; gcc makes it fast")
    with tempfile.TemporaryDirectory(prefix="minilm-") as folder:
        built = Path(folder) / f"{source.stem}.so"
        command = [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(source), "-lm"]
        # A scheduler's signals reach every process of a job, but are requests to this one: a killed
        # compiler would leave one rank on other arithmetic, and the run with other bits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)  # which a child inherits
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if done.returncode != 0:
            said = done.stderr.strip()[-200:]
            raise UncompiledError(f"{compiler} does not compile {source}: {said}")
        try:
            return ctypes.CDLL(str(built))  # stays loaded when the file is gone
        except OSError as error:  # a temporary folder from which nothing may be executed
            raise UncompiledError(f"{error}; set TMPDIR to a folder that allows it") from error
