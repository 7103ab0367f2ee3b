"""Exporting takes one tensor, not one model: peak resident memory of each of two ranks, as the kernel counts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import start_ranks

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("export_memory_worker.py")


@pytest.mark.parametrize(("strategy", "share"), [("fsdp2", 0.25), ("zero3", 0.08)])
def test_an_export_never_holds_the_model(
    tmp_path: Path, strategy: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is the probe's forward pass, which FSDP2 gathers layers for as in training, and on rank 0 the
    re-opened folder: embeddings, head, one decoder layer, one mapped file."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # else glibc keeps what was freed, and reuse looks like none
    start_ranks(WORKER, 2, tmp_path, [str(tmp_path), strategy])
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{strategy}-{rank}.json").read_text())
        print(rank, {name: f"{size / 2**20:.1f} MiB" for name, size in found.items()})
        assert found["whole"] > 0.9 * found["model"], "the measurement does not see a whole model"
        assert found["streamed"] < share * found["model"]
