"""Bytes of a file, wherever it lies and however it is compressed, within bounded memory."""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, Protocol, cast

import fsspec
import tenacity
from backports import zstd
from isal import igzip_lib

from data_prep.command import RunError, one_line

BLOCK = 2**20  # bytes that are read at once
COMPRESSED_BLOCK = 2**16  # and of a compressed file: how closely damage is located
PIECE = 2**17  # bytes that are decompressed at once: what damage can take of what precedes it
MAX_EXPANSION = 1000  # a compressed file that grows more than this ...
BOMB_BYTES = 2**30  # ... and beyond this is there to fill a disk, not to be read
_WINDOW = 2**27  # bytes of history that a stream may ask its reader to keep
_REMOTE_BLOCK = 2**23  # a request costs a round trip, so few and large ones
_ATTEMPTS = 5


class DamageError(Exception):
    """The rest of a stream, or one part of a table, cannot be decoded.

    Args:
        offset: where: byte of the file as it lies there, or number of a table's row.
        reason: why, for a person.
        lost: bytes of input that are lost with it.
    """

    def __init__(self, offset: int, reason: str, lost: int) -> None:
        super().__init__(offset, reason, lost)
        self.offset, self.reason, self.lost = offset, reason, lost


class _Decoder(Protocol):
    """What the decompressors of the standard library, of isal and of zstd have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


# isal decodes gzip 2 to 3 times as fast as zlib; zstd is the standard library's of Python 3.14
DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gz": lambda: cast(_Decoder, igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)),
    "xz": lambda: lzma.LZMADecompressor(memlimit=2 * _WINDOW),
    "zst": lambda: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _WINDOW.bit_length() - 1}
    ),
    "bz2": bz2.BZ2Decompressor,
}
_DECODING_ERRORS = (
    OSError,
    EOFError,
    lzma.LZMAError,
    zstd.ZstdError,
    cast(type[Exception], igzip_lib.IsalError),  # its stub calls the class an instance
)


def is_remote(url: str) -> bool:
    """Whether a name is a URL for fsspec rather than a path."""
    return "://" in url


def open_file(url: str, size: int, buffer_bytes: int = _REMOTE_BLOCK) -> BinaryIO:
    """A file for reading, seekable, as it lies there.

    Args:
        url: path, or a URL of fsspec's.
        size: its bytes.
        buffer_bytes: what a request for a part of a remote file asks for at least.

    Raises:
        RunError: it cannot be opened; or, later, read, for a remote one after several attempts.
    """
    if is_remote(url):
        return io.BufferedReader(_Remote(url, size), buffer_bytes)
    try:
        return open(url, "rb")
    except OSError as error:
        raise _unreadable(url, 0, error) from error


def patiently() -> tenacity.Retrying:
    """Calls again, with growing pauses, what fails for reasons that may pass."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5, max=30),
        reraise=True,
    )


def may_pass(error: BaseException) -> bool:
    """Whether what failed may succeed when it is tried again."""
    # over HTTP, fsspec says of whatever fails that there is no such file; the cause knows better
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    status = getattr(cause or error, "status", None)  # of HTTP, on aiohttp's errors
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)
    if cause is not None:
        return isinstance(cause, OSError) and not isinstance(cause, lasting)
    return isinstance(error, Exception) and not isinstance(error, lasting)


def _unreadable(url: str, offset: int, error: Exception) -> RunError:
    return RunError(
        f"{url} cannot be read at byte {offset} ({one_line(error) or type(error).__name__}), so "
        "its text would be missing from the corpus; make it readable and start again, or take it "
        "out of prep.input"
    )


class _Remote(io.RawIOBase):
    """A file behind fsspec, read by ranges, each asked for again where it does not come."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        try:
            data = patiently()(self._fetch, wanted)
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise _unreadable(self._url, self._position, error) from error
        buffer[:wanted] = data
        self._position += wanted
        return wanted

    def _fetch(self, wanted: int) -> bytes:
        file, self._file = self._file, None  # one that fails is not asked again
        if file is None:
            system, path = fsspec.core.url_to_fs(self._url)
            file = system.open(path, "rb", cache_type="none")
        file.seek(self._position)
        data = file.read(wanted)
        if len(data) != wanted:
            raise OSError(f"only {len(data)} of {wanted} bytes came")
        self._file = file
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def read_blocks(stream: BinaryIO, url: str, block_bytes: int = BLOCK) -> Iterator[bytes]:
    """The rest of an open file in blocks of at most `block_bytes`.

    Raises:
        RunError: the file cannot be read on.
    """
    while True:
        try:
            block = stream.read(block_bytes)
        except OSError as error:
            raise _unreadable(url, stream.tell(), error) from error
        if not block:
            return
        yield block


def inflate(blocks: Iterator[bytes], compression: str, size: int) -> Iterator[bytes]:
    """What compressed bytes say, in pieces of at most PIECE bytes.

    Members (of gzip and its kin) may follow each other, with zeros between them.

    Args:
        blocks: the compressed file, in order.
        compression: a key of DECODERS.
        size: compressed bytes in all, for what a DamageError counts as lost.

    Raises:
        DamageError: the bytes are cut off, corrupt, or expand beyond all measure. What could be
            decoded has been yielded.
    """
    taken = fed = made = 0  # compressed bytes taken, those before the last fed ones, decoded bytes
    decoder = DECODERS[compression]()
    for block in blocks:
        data = block.lstrip(b"\0") if decoder.eof else block
        taken += len(block)
        while data or not (decoder.needs_input or decoder.eof):
            if decoder.eof:
                decoder = DECODERS[compression]()
            if data:
                fed = taken - len(data)
            try:
                piece = decoder.decompress(data, PIECE)
            except _DECODING_ERRORS as error:
                reason = f"not {compression} from here on ({one_line(error)})"
                raise DamageError(fed, reason, size - fed) from error
            data = decoder.unused_data.lstrip(b"\0") if decoder.eof else b""
            made += len(piece)
            if made > BOMB_BYTES and made > MAX_EXPANSION * taken:
                raise DamageError(fed, f"expands more than {MAX_EXPANSION} times", size - fed)
            if piece:
                yield piece
    if taken and not decoder.eof:
        raise DamageError(taken, f"a {compression} file that was cut off", size - taken)
