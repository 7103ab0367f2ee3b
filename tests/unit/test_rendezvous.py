"""Ranks of several nodes meet at a port that anybody may reach: what they say there stands under their secret."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from sft_dist.config.cluster import SECRET_VARIABLE
from sft_dist.parallel.rendezvous import meet
from sft_dist.parallel.runtime import runtime

SECRET, PATIENCE = "0123456789abcdef" * 2, timedelta(seconds=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stranger(port: int) -> dist.Store:
    """Somebody who has found the port and knows no secret."""
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)


def test_who_does_not_know_the_secret_neither_finds_nor_replaces_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    port = free_port()
    ours = meet(f"tcp://127.0.0.1:{port}", 0, 1, PATIENCE)
    ours.set("key", "ours")
    theirs = stranger(port)
    assert not theirs.check(["key"])
    theirs.set("key", "theirs")
    assert ours.get("key") == b"ours"
    assert theirs.get(f"{SECRET}/key") == b"ours"  # a prefix is no authentication


def test_a_file_never_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    store = meet(f"file://{tmp_path / 'store'}", 0, 1, PATIENCE)  # which deletes its file in the end
    store.set("key", "ours")
    assert b"ours" in (tmp_path / "store").read_bytes() and SECRET.encode() not in (tmp_path / "store").read_bytes()


def test_the_process_group_of_a_worker_meets_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {
        SECRET_VARIABLE: SECRET, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with runtime(num_threads=1):
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store.underlying_store, dist.PrefixStore):  # torch adds prefixes of its own
            store = store.underlying_store
        store.set("said", "by torch")
        assert not stranger(port).check(["said"]) and stranger(port).check([f"{SECRET}/said"])
