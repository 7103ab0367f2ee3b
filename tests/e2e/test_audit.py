"""`sft-dist audit` on real run folders: stopped, resumed on another number of processes, and tampered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import command, lines, train, write_recipe

pytestmark = pytest.mark.slow


def audit(run_dir: Path, code: int) -> str:
    return command("audit", str(run_dir), code=code)


def test_a_run_is_proven_through_stop_and_resume_and_its_tampering_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, optim={"epochs": 3, "max_steps": None})
    run_dir = tmp_path / "run"
    train(recipe, "optim.stop_after_step=4", "--nproc", "2", code=75)
    assert "running" in audit(run_dir, 0)
    train(recipe)
    shown = audit(run_dir, 0)
    assert shown.splitlines()[-1] == "proven"
    assert shown.count("54 of 54 examples trained exactly once, finished") == 3

    metrics, checkpoint = run_dir / "metrics.jsonl", sorted((run_dir / "checkpoints").iterdir())[-1]
    kept = metrics.read_text()
    third = next(line for line in lines(run_dir, "step") if line["step"] == 3)
    metrics.write_text("".join(line + "\n" for line in kept.splitlines() if json.loads(line) != third))
    shown = audit(run_dir, 65)
    assert "line 3 of its steps is step 4" in shown and "was trained never" in shown and "NOT proven" in shown
    metrics.write_text(kept.replace(third["batch_digest"], "0" * 64))
    assert "step 3: batch_digest was 0000" in audit(run_dir, 65)
    metrics.write_text(kept)

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["meta"]["ledger"] = "1" * 64
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "altered (its digest does not match)" in audit(run_dir, 65)


def test_changed_data_and_no_run_folder_are_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, optim={"max_steps": 2})
    train(recipe)
    data = tmp_path / "data.json"
    data.write_text(data.read_text().replace("10 10", "10 11"))
    assert "data.train is" in audit(tmp_path / "run", 65)
    assert "it is no run folder" in audit(tmp_path, 65)
