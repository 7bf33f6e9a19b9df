"""C kernels for CPUs, compiled at first use.

A machine without a C compiler computes the same with torch's operations, slower.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

from data_prep.compiled import UncompiledError, compile_library

FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp".split()


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The library compiled from `name`.c beside this file, or None where it cannot be compiled.

    Warns once where it cannot: everything goes on, several times slower in that part.
    """
    try:
        return compile_library(Path(__file__).with_name(f"{name}.c"), FLAGS)
    except UncompiledError as error:
        warnings.warn(f"{name} on this CPU takes several times longer ({error})", stacklevel=2)
        return None


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's elements begin, as C takes it; None is NULL."""
    return None if tensor is None else tensor.data_ptr()
