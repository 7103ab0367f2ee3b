"""`sft-dist fetch` against a hub on this machine that speaks the real protocol: what was fetched is enough offline."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from tiny_run import write_recipe, write_tokenizer

SHA = "0123456789abcdef0123456789abcdef01234567"
GATED = "lab/gated"


class Hub(BaseHTTPRequestHandler):
    """Repositories of models below `folder`: the listing of a revision, and its files."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        if GATED in path:
            return self._send(403, b"", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            names = sorted(file.name for file in (self.folder / repo).glob("*"))
            listing: object = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            if "/tree/" in path:
                sizes = {name: (self.folder / repo / name).stat().st_size for name in names}
                listing = [{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in names]
            found = (self.folder / repo).is_dir()
            body = json.dumps(listing if found else {"error": "Repository not found"}).encode()
            return self._send(200 if found else 404, body, with_body, {} if found else {"X-Error-Code": "RepoNotFound"})
        repo, _, name = path.partition("/resolve/")
        file = self.folder / repo / name.partition("/")[2]
        if not file.is_file():
            return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
        body = file.read_bytes()
        self._send(200, body, with_body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": SHA})
        return None

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Its address. It holds lab/model: a tokenizer, a config, weights, and files that nobody needs."""
    folder = tmp_path / "hub"
    write_tokenizer(folder / "lab" / "model")
    (folder / "lab" / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "lab" / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "lab" / "model" / "pytorch_model.bin").write_bytes(b"pickles are never fetched")
    (folder / "lab" / "model" / "modeling.py").write_text("raise SystemExit('code is never fetched unasked')")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_what_was_fetched_is_enough_offline(
    hub: str, tmp_path: Path, run_cli: Callable[..., CompletedProcess[str]]
) -> None:
    recipe = write_recipe(tmp_path, "run", model={"tokenizer": "lab/model"})
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub, "HF_TOKEN": "secret"}

    before = run_cli("fetch", recipe, HF_HUB_OFFLINE="1", **cache)
    assert before.returncode == 2 and "run `sft-dist fetch` once where the hub can be reached" in before.stderr

    fetched = run_cli("fetch", recipe, "model.path=lab/model", "model.init=pretrained", HF_HUB_OFFLINE="0", **cache)
    assert fetched.returncode == 0, fetched.stderr
    names = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py"}

    offline = run_cli(
        "data", "plan", recipe, "--json", HF_HUB_OFFLINE="1", **{**cache, "HF_ENDPOINT": "http://127.0.0.1:1"}
    )
    assert offline.returncode == 0, offline.stderr

    for name, said in ((GATED, "is gated: accept its terms on the hub"), ("lab/none", "not on the hub, or private")):
        refused = run_cli("fetch", recipe, f"model.tokenizer={name}", HF_HUB_OFFLINE="0", **cache)
        assert refused.returncode == 2 and f"model.tokenizer={name}: {said}" in refused.stderr
        assert "secret" not in refused.stderr
