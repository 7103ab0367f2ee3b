"""Uploading an export: to a server on this machine that speaks as much of the hub's API as an upload needs."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from sft_dist.checkpoint import hub_push
from sft_dist.checkpoint.hub_push import check_hub, push
from sft_dist.config.schema import HubSection
from sft_dist.errors import ConfigError

HUB = HubSection(push_to="me/tuned")


class Hub(ThreadingHTTPServer):
    """Repositories, small files inside commits; 403 for owners other than `me`."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        super().__init__(("127.0.0.1", 0), Request)


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            if wanted.get("organization") not in (None, "me"):
                return self._answer(403, {"error": "You don't have the rights to create a model there"})
            self.server.created.append(wanted)
            return self._answer(200, {"url": "https://huggingface.co/me/tuned", "id": "me/tuned", "name": "me/tuned"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": "https://huggingface.co/me/tuned/commit/1", "commitOid": "1" * 40, "success": True}
            return self._answer(200, commit)
        return self._answer(404, {"error": self.path})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub_push, "HfApi", lambda: HfApi(endpoint=address, token="hf_known"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    return folder


def test_the_export_arrives_file_by_file(hub: Hub, export: Path) -> None:
    told = push(export, HUB, "tuned, 12 steps")
    assert told == "uploaded to me/tuned: https://huggingface.co/me/tuned/commit/1"
    assert hub.files == {path.name: path.read_bytes() for path in export.iterdir()}
    assert hub.created[0]["visibility"] == "private" and hub.tokens == {"Bearer hf_known"}
    push(export, HubSection(push_to="me/tuned", private=False), "again")
    assert hub.created[1]["visibility"] == "public"


def test_an_upload_that_fails_tells_how_to_send_it_later(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = push(export, HubSection(push_to="they/tuned"), "x")
    assert told.startswith("warning: hub.push_to=they/tuned: not uploaded (")
    assert told.endswith(f"hf upload they/tuned {export}") and "hf_known" not in told
    hub.shutdown()
    hub.server_close()
    assert "not uploaded" in push(export, HUB, "x")
    assert (export / "model.safetensors").exists()


def test_what_cannot_be_uploaded_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hub(HubSection())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hub\.push_to=me/tuned: HF_HUB_OFFLINE is set"):
        check_hub(HUB)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_push, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token: set HF_TOKEN"):
        check_hub(HUB)
    monkeypatch.setattr(hub_push, "get_token", lambda: "hf_x")
    check_hub(HUB)
