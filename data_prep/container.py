"""Files of named arrays, written once from front to back: what the stages of preparation leave.

The arrays lie end to end; a footer of JSON says where, and what else there is to know; the last
eight bytes say how long the footer is. One file per unit of work appears at once, when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_prep.durable import durable_write

_LENGTH = struct.Struct("<Q")
_ALIGN = 16  # so that a mapped array's elements are aligned


@dataclasses.dataclass
class _Place:
    dtype: np.dtype[Any]
    offset: int
    count: int = 0


class ContainerWriter:
    """Appends arrays to a stream. `facts` is written with the footer, so fill it at any time."""

    def __init__(self, stream: BinaryIO) -> None:
        self.facts: dict[str, Any] = {}
        self._stream, self._places, self._position = stream, dict[str, _Place](), 0

    def append(self, name: str, array: npt.NDArray[Any]) -> None:
        """Add elements to the end of an array; no other array may have been added to since."""
        place = self._places.get(name)
        if place is None:
            self._write(bytes(-self._position % _ALIGN))
            place = self._places[name] = _Place(array.dtype, self._position)
        end = place.offset + place.count * place.dtype.itemsize
        if end != self._position or array.dtype != place.dtype:
            raise ValueError(f"{name} cannot be added to: it does not end here, or has other types")
        self._write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
        place.count += len(array)

    def finish(self) -> None:
        """Write the footer."""
        arrays = {
            name: [place.dtype.descr if place.dtype.names else place.dtype.str, place.offset,
                   place.count]
            for name, place in self._places.items()
        }  # fmt: skip
        footer = json.dumps({"arrays": arrays, "facts": self.facts}, sort_keys=True).encode()
        self._write(footer)
        self._write(_LENGTH.pack(len(footer)))

    def _write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._position += len(data)


@contextlib.contextmanager
def write_container(path: Path) -> Iterator[ContainerWriter]:
    """A writer whose file appears at `path` at once and durably, when the block ends.

    Raises:
        RunError: the file cannot be written.
    """
    with durable_write(path) as stream:
        writer = ContainerWriter(stream)
        yield writer
        writer.finish()


class Container:
    """A written file; arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as stream:
            end = stream.seek(-_LENGTH.size, 2)
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            stream.seek(end - length)
            footer: Mapping[str, Any] = json.loads(stream.read(length))
        self.facts: dict[str, Any] = footer["facts"]
        self._arrays: dict[str, Any] = footer["arrays"]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """The elements [start, stop) of an array, in memory."""
        dtype, offset, count = self._place(name)
        stop = count if stop is None else stop
        return np.fromfile(
            self.path, dtype, count=stop - start, offset=offset + start * dtype.itemsize
        )

    def map(self, name: str) -> npt.NDArray[Any]:
        """A whole array, mapped: what is looked at comes into memory."""
        dtype, offset, count = self._place(name)
        if not count:
            return np.zeros(0, dtype)
        return np.memmap(self.path, dtype, mode="r", offset=offset, shape=(count,))

    def _place(self, name: str) -> tuple[np.dtype[Any], int, int]:
        described, offset, count = self._arrays[name]
        names = described if isinstance(described, str) else [tuple(f) for f in described]
        return np.dtype(names), offset, count
