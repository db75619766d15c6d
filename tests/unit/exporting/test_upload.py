"""Uploads, to a small server that answers as the Hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lckv.errors import UserError
from lckv.exporting.upload import check_access, upload


class Hub(BaseHTTPRequestHandler):
    """Knows one token, takes every file as it is, and notes what it is sent."""

    TOKEN = "hf_known"
    server: Any

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path.partition("?")[0], body))
        if self.headers.get("Authorization") != f"Bearer {self.TOKEN}":
            self._send(401, {"error": "Invalid credentials"})
            return
        for path, answer in {
            "/api/whoami-v2": lambda _: {"name": "me", "type": "user"},
            "/api/repos/create": lambda _: {"url": f"{constants.ENDPOINT}/me/model"},
            "/api/validate-yaml": lambda _: {"errors": [], "warnings": []},
            "/preupload/main": self._modes,
            "/tree/main": lambda _: [{"type": "file", "path": "old.safetensors", "oid": "0" * 40, "size": 1}],
            "/commit/main": lambda _: {
                "commitUrl": f"{constants.ENDPOINT}/me/model/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            },
        }.items():
            if self.path.partition("?")[0].endswith(path):
                self._send(403 if path in self.server.closed else 200, answer(body))
                return
        self._send(404, {"error": f"no {self.path}"})

    def _modes(self, body: bytes) -> dict:
        files = json.loads(body)["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        return {"files": modes}

    def _send(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The server, in the place of the Hub, with a token that it knows."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.closed = [], set()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlicense: unknown\n---\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_folder_is_uploaded_whole(hub: Any, folder: Path) -> None:
    check_access("me/model")
    assert upload(folder, "me/model").endswith("/me/model")
    (commit,) = [body for path, body in hub.asked if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert set(files) == {"README.md", "model.safetensors"}
    assert base64.b64decode(files["model.safetensors"]) == b"weights"
    assert [line["value"]["path"] for line in lines if line["key"] == "deletedFile"] == ["old.safetensors"]


def test_folder_stays_where_the_upload_fails(hub: Any, folder: Path) -> None:
    hub.closed.add("/commit/main")
    with pytest.raises(UserError, match=f"push=me/model: the Hub says: .*; {folder} is written: hf upload me/model"):
        upload(folder, "me/model")
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_token_that_the_hub_does_not_know(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(UserError, match="push=me/model: the Hub says: Invalid user token"):
        check_access("me/model")


def test_hub_that_is_not_to_be_asked(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="as HF_HUB_OFFLINE says"):
        check_access("me/model")
    assert not hub.asked


def test_hub_that_does_not_answer(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="push=me/model: the Hub says: .*refused"):
        check_access("me/model")
