"""Blocks kept on a local disk, bounded, shared by all ranks of a host.

fsspec's own caches know no bound and no second process. Here a block is a file named by its
content, so that no entry is ever out of date; what was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.command import ConfigError, one_line

ROOM = 0.1  # share of the bound that one clearing frees, so that not every block pays for one
SUFFIX = ".block"  # nothing else in the folder is ever counted or removed
_PARTIAL = ".partial"
_TOTAL = ".total"  # the bytes that all blocks take together; its lock guards writing
_DIGITS = 20


class BlockCache:
    """A folder of blocks, in which any number of processes keep and find some.

    The cache only saves time: where a block cannot be kept, that is said once on stderr, and its
    storage is read again.

    Args:
        folder: made where it is missing; on a local disk.
        max_bytes: that all blocks may take together.

    Raises:
        ConfigError: nothing can be written there.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._is_writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as descriptor:
                # A process that was killed may have counted what it did not write.
                _write_total(descriptor, self._clear(max_bytes))
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={folder} cannot be written ({error.strerror or one_line(error)}), "
                "so no block can be kept there; name a folder on a local disk, or null for none"
            ) from error

    def get(self, key: str) -> bytes | None:
        """A block as it lies there; None where there is none. The caller checks what it gets."""
        path = self._folder / (key + SUFFIX)
        try:
            raw = path.read_bytes()
            os.utime(path)
        except OSError:  # not kept, removed by another rank or unreadable: its storage has it
            return None
        return raw

    def put(self, key: str, raw: bytes) -> None:
        """Keep a block, replacing one of that key, and clear others away where they are too much.

        A reader finds it whole or not at all, unless the machine stops in between.
        """
        if not self._is_writable or len(raw) > self._max_bytes:
            return
        path = self._folder / (key + SUFFIX)
        partial = self._folder / _PARTIAL
        try:
            with self._locked() as descriptor:
                kept = _read_total(descriptor)
                added = len(raw) - (path.stat().st_size if path.exists() else 0)
                if kept is None or kept + added > self._max_bytes:
                    path.unlink(missing_ok=True)
                    added = len(raw)
                    room = max(added, int(self._max_bytes * ROOM))
                    kept = self._clear(self._max_bytes - room)
                # First: a total that is too high is put right when next counted.
                _write_total(descriptor, kept + added)
                partial.write_bytes(raw)
                os.replace(partial, path)
        except OSError as error:
            self._is_writable = False
            with contextlib.suppress(OSError):
                partial.unlink()
            print(
                f"warning: data.cache_dir={self._folder} cannot be written "
                f"({error.strerror or one_line(error)}); this process keeps no more blocks there",
                file=sys.stderr,
                flush=True,
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the total's file, while no other process or thread writes."""
        descriptor = os.open(self._folder / _TOTAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _clear(self, target: int) -> int:
        """Remove what was used longest ago down to `target` bytes; returns what is left."""
        blocks = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX):
                    facts = entry.stat()
                    blocks.append((facts.st_mtime_ns, entry.path, facts.st_size))
        total = sum(size for _, _, size in blocks)
        for _, path, size in sorted(blocks):
            if total <= target:
                break
            os.unlink(path)
            total -= size
        return total


def _read_total(descriptor: int) -> int | None:
    """None where it was never written, or is not what was written."""
    digits = os.pread(descriptor, _DIGITS, 0)
    return int(digits) if len(digits) == _DIGITS and digits.isdigit() else None


def _write_total(descriptor: int, total: int) -> None:
    os.pwrite(descriptor, f"{total:0{_DIGITS}d}".encode(), 0)
