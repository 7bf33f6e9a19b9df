"""A folder over HTTP with ranges, from a server that fails as it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FlakyServer:
    """What was asked of the server, and how it fails.

    Args:
        folder: whose files it serves.

    `faults` are taken by GET requests in order, one each: "500", "403", "short" (fewer bytes than
    asked for, as a whole answer), "cut" (the connection ends within the body), "drop" (before any
    answer), "whole" (the range is not heeded) or "garbled" (a bit is flipped). No fault is left:
    the answer is right.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # on kept connections the client would try again by itself
    flaky: FlakyServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD", None)

    def do_GET(self) -> None:
        self._answer("GET", self.flaky.faults.pop(0) if self.flaky.faults else None)

    def _answer(self, method: str, fault: str | None) -> None:
        self.flaky.requests.append((method, self.path))
        path = self.flaky.folder / self.path.lstrip("/")
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault in ("500", "403") or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and fault != "whole":
            data, status = data[int(asked[1]) : int(asked[2]) + 1], 206
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "garbled":  # whole, but for one byte
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
        if method == "GET":
            self.wfile.write(data)


@contextlib.contextmanager
def flaky_server(folder: Path) -> Iterator[FlakyServer]:
    """Serve a folder on a port of this host."""
    flaky = FlakyServer(folder)
    handler = type("Handler", (_Handler,), {"flaky": flaky})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        flaky.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield flaky
        server.shutdown()
        thread.join()
