"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.command import RunError, one_line


@contextlib.contextmanager
def durable_write(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes appear at `path` all at once, after they are on disk.

    The name is on disk too when this returns, so that what is written next may rely on the file.

    Raises:
        RunError: the bytes cannot be written, for example because the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk is not left fuller
        raise RunError(
            f"{path} cannot be written ({error.strerror or one_line(error)}); make room for it and "
            "start the same command again, which goes on from here"
        ) from error


def write_durably(path: Path, text: str) -> None:
    """Replace a small file of text, as `durable_write` does."""
    with durable_write(path) as stream:
        stream.write(text.encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
