"""Reads from wherever fsspec reaches, tried again where that can help.

Object storage fails now and then by design. What may pass (no answer, a cut body, a server's error)
is tried again after growing, random waits; what will not (no such file, no permission) is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from data_prep.command import RunError, masked, one_line

ATTEMPTS = 8
LONGEST_WAIT = 30.0  # seconds; the waits before all attempts are a minute at most, half on average
AT_ONCE = 16  # questions after the sizes of files that a listing does not answer

_Result = TypeVar("_Result")
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class _FaultyError(OSError):
    """Bytes came, and they are not right."""

    def __init__(self, fault: str, data: bytes) -> None:
        super().__init__(fault)
        self.data = data


class Storage:
    """Files below a folder, by its path or fsspec URL.

    Args:
        url: of the folder.

    Raises:
        ValueError: fsspec knows no such protocol.
        ImportError: the protocol needs a package that is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = masked(url.rstrip("/") or url)  # for messages
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        self.is_remote = not isinstance(self._fs, LocalFileSystem)

    def read(
        self,
        name: str,
        start: int | None = None,
        stop: int | None = None,
        fault: Callable[[bytes], str | None] = lambda _: None,
    ) -> bytes:
        """A file's bytes, or those from `start` to before `stop`.

        On remote storage a body of another length than was asked for, or with a fault, counts as a
        failed attempt; if the last attempt has the fault too, its bytes come back for the caller to
        refuse. A local file that ends early gives what it has.

        Args:
            name: of the file.
            start: first byte; None is the file's.
            stop: one beyond the last byte.
            fault: says what is wrong with the bytes; None where nothing is.

        Raises:
            FileNotFoundError: there is no such file.
            RunError: it cannot be read.
        """
        where = f"{self.url}/{name}"

        def attempt() -> bytes:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop)
            if self.is_remote and start is not None and stop is not None:
                if len(data) != stop - start:
                    raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
            if self.is_remote and (found := fault(data)) is not None:
                raise _FaultyError(found, data)
            return data

        try:
            return _retried(where, attempt)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(where) from error
        except Exception as error:
            if isinstance(error.__cause__, _FaultyError):
                return error.__cause__.data
            if not _is_of_storage(error):
                raise
            raise RunError(
                f"{where} cannot be read ({_named(error)}), and trying again would not help; see "
                "that it may be read from here, and start the same command again"
            ) from error

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """The bytes of each file, None where the storage does not say.

        One listing answers for most storages, however many files there are. What it leaves open is
        asked for file by file, several at once.

        Raises:
            FileNotFoundError: one of the files is missing.
            RunError: the storage does not answer.
        """
        listed = self._listed()
        sizes = {name: listed.get(name) for name in names}
        unknown = [name for name, size in sizes.items() if size is None]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            sizes.update(zip(unknown, pool.map(self._size, unknown), strict=True))
        return sizes

    def _listed(self) -> dict[str, int | None]:
        """Sizes by name as the folder's listing has them; nothing where it cannot be listed."""
        self._fs.invalidate_cache(self._root)
        try:
            entries = _retried(self.url, lambda: self._fs.ls(self._root, detail=True))
        except Exception as error:
            if not _is_of_storage(error):
                raise
            return {}  # listing can be forbidden, or unknown as over HTTP, where reading is not
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def _size(self, name: str) -> int | None:
        where = f"{self.url}/{name}"
        try:
            size: int | None = _retried(where, lambda: self._fs.size(f"{self._root}/{name}"))
        except FileNotFoundError as error:
            raise FileNotFoundError(where) from error
        except Exception as error:
            if not _is_of_storage(error):
                raise
            raise RunError(f"the size of {where} cannot be read ({_named(error)})") from error
        return size


def _retried(where: str, call: Callable[[], _Result]) -> _Result:
    """What `call` returns, at the latest from the last attempt.

    Raises:
        RunError: all attempts failed in ways that may pass.
    """

    def say(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        print(
            f"warning: {where}: {masked(_named(state.outcome.exception()))}; attempt "
            f"{state.attempt_number + 1} of {ATTEMPTS} in {state.next_action.sleep:.1f} s",
            file=sys.stderr,
            flush=True,
        )

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT),
        before_sleep=say,
    )
    try:
        return attempts(call)
    except tenacity.RetryError as error:
        last = error.last_attempt.exception()
        raise RunError(
            f"{where} cannot be read: all {ATTEMPTS} attempts failed, the last one with "
            f"{_named(last)}; see that the storage answers, and start the same command again"
        ) from last


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later.

    Where the answer has an HTTP status, that decides. Client libraries raise their own exceptions
    for lost connections, so an unknown one is taken for passing; a builtin one is a bug.
    """
    cause = error.__cause__
    for one in (error, cause):
        if (status := _http_status(one)) is not None:
            return status >= 500 or status in (408, 429)
    if isinstance(error, FileNotFoundError) and cause is not None:
        return is_transient(cause)  # fsspec's HTTP says so of whatever kept it from asking
    return _is_of_storage(error) and not isinstance(error, _LASTING)


def _http_status(error: BaseException | None) -> int | None:
    """Of an HTTP answer as aiohttp or botocore keep it in their exceptions."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_of_storage(error: BaseException) -> bool:
    is_library = type(error).__module__ != "builtins" and not isinstance(error, RunError)
    return isinstance(error, OSError) or is_library


def _named(error: BaseException | None) -> str:
    """The exception's message; client libraries leave some empty."""
    return one_line(error) or type(error).__name__
