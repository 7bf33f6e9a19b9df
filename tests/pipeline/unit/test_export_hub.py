"""Pushing to a hub, which here is a server of a few lines that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_prep.command import ConfigError, RunError
from pipeline.export import main
from pipeline.source_card import licence_of


class Hub(ThreadingHTTPServer):
    """A model repository: `files` by path, public as it was made, no commits where it `is_full`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.is_public: bool | None = None
        self.is_full = False
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            entry = {"type": "file", "size": 1, "oid": "0" * 40}
            self.answer([{**entry, "path": name} for name in self.server.files])
        else:
            self.answer({"id": "me/small", "private": not self.server.is_public, "sha": "a" * 40})

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        self.server.tokens.add(self.headers["Authorization"])
        if path == "/api/repos/create":
            asked = json.loads(body)
            assert (asked["organization"], asked["name"]) == ("me", "small")
            status = 409
            if self.server.is_public is None:
                self.server.is_public = asked.get("visibility") != "private"
                status = 200
            self.answer({"url": f"{self.server.url}/me/small"}, status)
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/commit/main") and self.server.is_full:
            self.answer({"error": "storage is full"}, 403)
        elif path.endswith("/commit/main"):
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self.answer({"commitUrl": f"{self.server.url}/me/small/commit/1", "commitOid": "1"})
        else:
            self.answer({"warnings": [], "errors": []})  # of a card's front matter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def push(source: Path, folder: Path, *options: str) -> int:
    arguments = ["--model", str(source), "--output_dir", str(folder), "--push_to_hub", "me/small"]
    return main([*arguments, *options])


def test_the_hub_holds_the_folder_and_nothing_of_an_older_one(
    hub: Hub, tiny_models: dict[str, Path], pocket_teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    source = _with_tokenizer(tiny_models["xlm-roberta"], pocket_teacher, tmp_path / "source")
    assert push(source, tmp_path / "out", "--private") == 0
    assert hub.is_public is False
    sent = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= sent.keys()
    assert hub.files == sent
    assert hub.tokens == {"Bearer hf_secret"}
    out = capsys.readouterr().out
    assert out.splitlines() == [str(tmp_path / "out"), f"{hub.url}/me/small/commit/1"]
    hub.files |= {"onnx/model_int8.onnx": b"of older weights", "photo.png": b"somebody's"}
    assert push(source, tmp_path / "out", "--private") == 0
    assert hub.files == {**sent, "photo.png": b"somebody's"}

    hub.is_full = True
    with pytest.raises(RunError, match=r"me/small was not pushed to .*full.*whole in .*out"):
        push(source, tmp_path / "out")

    hub.is_public, hub.is_full, hub.files = True, False, {}
    with pytest.raises(ConfigError, match="exists and is public"):
        push(source, tmp_path / "out", "--private")
    assert hub.files == {}


def _with_tokenizer(model: Path, tokenizer: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in [*model.iterdir(), *tokenizer.glob("tokenizer*")]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_what_cannot_be_pushed_is_refused_before_the_export(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.export_formats.hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token with write access"):
        push(tmp_path, tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CARDS = {
    "---\nlicense: mit\n---\n# X": "mit",
    "---\nlicense: [mit, apache-2.0]\n---\n": "mit, apache-2.0",
    "---\nlanguage: de\n---\n": None,
    "---\nlicense: {\n---\n": None,
    "# X\nlicense: mit\n": None,
    "# X\n\n---\nlicense: mit\n---\n": None,
}


@pytest.mark.parametrize("card", CARDS)
def test_a_licence_is_what_the_front_matter_says(card: str, tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == CARDS[card]


def test_the_licence_of_a_hub_s_model_is_unknown_without_the_hub() -> None:
    assert licence_of("nobody/nothing") is None
