"""C kernels for CPUs, compiled for this very processor at first use.

That takes a third of a second, so nothing is kept that could be stale, or of another host's
processor. A machine without a C compiler computes the same with torch's operations, slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library compiled from `name`.c beside this file, or None where it cannot be compiled.

    Warns once where it cannot: everything goes on, several times slower in that part.
    """
    source = Path(__file__).with_name(f"{name}.c")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    reason = "there is no C compiler, cc or what CC names"
    if compiler is not None:
        with tempfile.TemporaryDirectory(prefix="minilm-") as folder:
            built = Path(folder) / f"{name}.so"
            command = [compiler, *FLAGS, "-o", str(built), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            reason = f"{compiler} does not compile {source}: {done.stderr.strip()[-200:]}"
            if done.returncode == 0:
                try:
                    return ctypes.CDLL(str(built))  # stays loaded when the file is gone
                except OSError as error:  # a temporary folder from which nothing may be executed
                    reason = f"{error}; set TMPDIR to a folder that allows it"
    warnings.warn(
        f"{name} on this CPU takes several times longer ({reason}); gcc makes it fast", stacklevel=2
    )
    return None


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements begin, as C takes it; None is NULL."""
    return None if tensor is None else tensor.data_ptr()
