"""Files of named arrays, written once from front to back: what the stages of preparation leave.

The arrays lie end to end; a footer of JSON says where, and what else there is to know; the last
bytes say where the footer is and what its checksum is, so that a file that lost its end, or bytes
before it, is noticed. One file per unit of work appears at once, when it is whole.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_prep.command import RunError
from data_prep.durable import durable_write

_TAIL = struct.Struct("<QQI")  # where the footer begins, its length and its CRC
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
        """Add elements to the end of an array.

        Args:
            name: of the array, which begins with its first elements.
            array: [n] of any type without Python objects, the same each time.

        Raises:
            ValueError: another array was added to since, or the elements do not go with the array.
        """
        if array.ndim != 1 or array.dtype.hasobject:
            raise ValueError(f"{name} cannot be written: it is no flat array of plain elements")
        place = self._places.get(name)
        if place is None:
            self._write(bytes(-self._position % _ALIGN))
            place = self._places[name] = _Place(array.dtype, self._position)
        end = place.offset + place.count * place.dtype.itemsize
        if end != self._position or array.dtype != place.dtype:
            raise ValueError(f"{name} cannot be added to: it does not end here or has another type")
        self._write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
        place.count += len(array)

    def finish(self) -> None:
        """Write the footer."""
        arrays = {
            # a description has tuples, which JSON lacks
            name: [repr(np.lib.format.dtype_to_descr(place.dtype)), place.offset, place.count]
            for name, place in self._places.items()
        }
        footer = json.dumps({"arrays": arrays, "facts": self.facts}, sort_keys=True).encode()
        tail = _TAIL.pack(self._position, len(footer), zlib.crc32(footer))
        self._write(footer)
        self._write(tail)

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
    """A written file; arrays are read when they are asked for.

    Args:
        path: of the file.

    Raises:
        OSError: there is no such file.
        RunError: it is torn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as stream:
            found = _read_footer(stream)
        if found is None:
            raise RunError(
                f"{path} is damaged: it does not end as it was written, so what it held is lost; "
                f"remove the folder {path.parent.name!r} that it is in and start the same command "
                "again, which makes it anew"
            )
        footer = json.loads(found)
        self.facts: dict[str, Any] = footer["facts"]
        self._arrays: dict[str, Any] = footer["arrays"]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """The elements [start, stop) of an array, in memory; as a slice, it ends with the array."""
        dtype, offset, count = self._place(name)
        start, stop, _ = slice(start, stop).indices(count)
        stop = max(start, stop)
        return np.fromfile(
            self.path, dtype, count=stop - start, offset=offset + start * dtype.itemsize
        )

    def map(self, name: str) -> npt.NDArray[Any]:
        """A whole array, mapped: what is looked at comes into memory."""
        dtype, offset, count = self._place(name)
        if not count:
            return np.zeros(0, dtype)
        mapped = np.memmap(self.path, dtype, mode="r", offset=offset, shape=(count,))
        return np.asarray(mapped)  # a slice of a memmap is made by Python code, slowly

    def _place(self, name: str) -> tuple[np.dtype[Any], int, int]:
        description, offset, count = self._arrays[name]
        return np.lib.format.descr_to_dtype(ast.literal_eval(description)), offset, count


def _read_footer(stream: BinaryIO) -> bytes | None:
    """The footer, or None where the file does not end with one."""
    size = stream.seek(0, os.SEEK_END)
    if size < _TAIL.size:
        return None
    stream.seek(size - _TAIL.size)
    begin, length, checksum = _TAIL.unpack(stream.read())
    if not length or begin + length + _TAIL.size != size:
        return None
    stream.seek(begin)
    footer = stream.read(length)
    return footer if zlib.crc32(footer) == checksum else None
