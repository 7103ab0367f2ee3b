"""A run on streamed sources: the same steps on one process and two, through kills, and proven afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tiny_run import SECONDS, command, lines, start, train, trajectory, weights, write_recipe

pytestmark = pytest.mark.slow

STEPS = 22  # the first window has 16,384 examples: it ends in step 20 or so


def write_stream(folder: Path, name: str, sources: list[dict[str, object]] | None = None) -> Path:
    for number, rows in enumerate((9000, 9000)):
        file = folder / f"part-{number}.jsonl"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps({"text": f"{n} {'ab' * (n % 5)}"}) + "\n" for n in range(rows)))
    given = sources or [{"path": str(folder / "part-*.jsonl"), "format": "text", "streaming": True}]
    return write_recipe(
        folder, name,
        data={"sources": given, "eval_fraction": 0.0, "seq_len": 512},
        batch={"tokens_per_micro_batch": 1024, "tokens_per_step": 8192},
        optim={"max_steps": STEPS}, checkpoint={"every_steps": 4}, eval={"generate": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    train(write_stream(folder, "straight"), "--nproc", "1")
    return folder / "straight"


def test_a_stream_trains_and_is_reported(straight: Path) -> None:
    assert len(trajectory(straight)) == STEPS
    report = json.loads((straight / "prepare_report.json").read_text())
    assert report["sources"][0]["accepted"] > 16_384
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]


def test_killed_and_continued_on_another_number_of_processes(folder: Path, straight: Path) -> None:
    """Its cache is its own: it reads the stream anew, with two processes, is killed, and ends on two."""
    recipe = write_stream(folder, "killed")
    cache = f"data.cache_dir={folder / 'other-cache'}"
    process = start("train", str(recipe), cache, "--nproc", "2")
    deadline = time.monotonic() + SECONDS
    while not (folder / "killed" / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        os.sched_yield()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resuming after step" in train(recipe, cache, "--nproc", "2")
    digests = [[line["batch_digest"] for line in lines(run, "step")] for run in (folder / "killed", straight)]
    assert digests[0] == digests[1]
    losses = [[line["loss"] for line in lines(run, "step")] for run in (folder / "killed", straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_stopped_and_continued_bit_identically(folder: Path, straight: Path) -> None:
    recipe = write_stream(folder, "stopped")
    train(recipe, "optim.stop_after_step=20", code=75)
    train(recipe)
    assert trajectory(folder / "stopped") == trajectory(straight)
    assert weights(folder / "stopped") == weights(straight)


def test_the_run_is_proven_and_a_step_shown(straight: Path) -> None:
    for verb in (("audit", str(straight)), ("replay", str(straight), "--step", "21")):
        command(*verb)
    altered = next((straight.parent / ".sft-cache" / "streams").glob("*/segment-000000/corpus/examples.arrow"))
    content = bytearray(altered.read_bytes())
    content[len(content) // 3] ^= 1
    altered.write_bytes(content)
    command("audit", str(straight), code=65)
