"""`sft-dist checkpoint ls | verify`: what they print, that they only read, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sft_dist.checkpoint.catalog import folders
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.cli.main import main


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path / "run")
    for step in (100, 200):
        manager.save(step, {"model.w": torch.full((4,), float(step))}, {"step": step})
    return tmp_path / "run"


def snapshot(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run_dir.rglob("*")) if path.is_file()}


def test_ls_names_steps_and_sizes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "ls", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "100"], ["step", "200"]]
    assert main(["checkpoint", "ls", str(run_dir), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["step"], entry["world_size"], entry["fault"]) for entry in listed] == [
        (100, 1, None),
        (200, 1, None),
    ]


def test_verify_of_good_ones_is_0(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("good") == 2


def test_verify_of_a_bad_one_is_65_names_file_and_step_and_only_reads(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = folders(run_dir)[0].glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    before = snapshot(run_dir)
    assert main(["checkpoint", "verify", str(run_dir)]) == 65
    out, err = capsys.readouterr()
    assert "good" in out and "BAD" in out
    assert err.startswith(f"sft-dist: error: step 100 in {folders(run_dir)[0]}: {shard.name}: altered")
    assert main(["checkpoint", "verify", str(run_dir), "--json"]) == 65
    assert [bool(entry["fault"]) for entry in json.loads(capsys.readouterr().out)] == [True, False]
    assert snapshot(run_dir) == before


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(tmp_path / "nothing")]) == 65
    assert capsys.readouterr().err == f"sft-dist: error: {tmp_path / 'nothing'}: no such run folder\n"


def test_export_of_a_folder_without_config_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "export", str(run_dir)]) == 65
    assert "holds no config.yaml" in capsys.readouterr().err


def test_verify_where_only_bad_ones_were_is_65(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run_dir / "checkpoints").iterdir():
        path.rename(path.with_name(path.name + ".bad-1"))
    assert main(["checkpoint", "verify", str(run_dir)]) == 65
    shown = capsys.readouterr()
    assert "set aside as bad" in shown.out and "no checkpoint is left" in shown.err
