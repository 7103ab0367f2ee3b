"""The doctor's findings: folders are really tried, what is missing comes with its reason and its command."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from sft_dist import doctor
from sft_dist.cli import main as cli
from sft_dist.doctor import BLOCKED, NOTE, OK, Finding, blocking, examine, folder


def test_this_machine_can_train_and_every_note_says_what_is_lost(tmp_path: Path) -> None:
    findings = list(examine(tmp_path / "run", tmp_path / "cache"))
    assert blocking(findings) is None
    parts = [finding.part for finding in findings]
    assert {"python", "torch", "cpu", "memory", "shm", "open files", "run.dir", "slurm", "hub token"} <= set(parts)
    assert len(parts) == len(set(parts))
    assert all(finding.found for finding in findings)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_tried_where_it_will_be_made(tmp_path: Path) -> None:
    found = folder("run.dir", tmp_path / "new" / "run")
    assert found.state in (OK, NOTE) and "write, fsync, rename and lock work" in found.found


def test_a_folder_below_a_file_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = folder("run.dir", tmp_path / "file" / "run")
    assert (found.state, found.remedy) == (BLOCKED, "set run.dir to a folder")


@pytest.mark.parametrize("step", ["fsync", "rename", "flock"])
def test_a_file_system_that_lacks_a_step_blocks(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    owner = {"fsync": os, "rename": Path, "flock": doctor.fcntl}[step]
    monkeypatch.setattr(owner, step, refuse)
    found = folder("data.cache_dir", tmp_path)
    assert found.state == BLOCKED
    assert "Operation not supported on" in found.found and "set data.cache_dir" in found.remedy


def test_the_file_system_is_named_by_its_mount(tmp_path: Path) -> None:
    assert doctor.file_system(Path("/proc/self")) == "proc"
    assert doctor.file_system(tmp_path) != "unknown"


def test_a_missing_part_comes_with_its_command() -> None:
    found = doctor.optional("fast", "no_such_module", "pip install fast", "it is slow")
    assert found == Finding("fast", NOTE, "not installed: it is slow", "pip install fast")


def test_a_part_that_breaks_while_it_is_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_part.py").write_text("print('noise')\nraise ImportError('libcudart.so.12: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.optional("broken", "broken_part", "pip install broken", "it is slow")
    assert (
        found.state == NOTE
        and found.found == "cannot be imported (ImportError: libcudart.so.12: not found): it is slow"
    )
    assert "broken_part" not in sys.modules


def test_a_low_limit_of_open_files_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 65536))
    (found,) = [finding for finding in examine(Path("."), Path(".")) if finding.part == "open files"]
    assert (found.state, found.remedy) == (NOTE, "ulimit -n 65536")


def test_a_token_is_reported_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    assert cli.main(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["can_train"] is True
    assert {"part": "hub token", "state": "ok", "found": "yes", "remedy": ""} in found["findings"]
    assert "hf_secret_value" not in shown.out + shown.err


def test_the_first_blocking_problem_ends_in_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "no-such-package"))
    assert cli.main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert "X no-such-package" in shown.out
    assert shown.err == "sft-dist: error: no-such-package: not installed: pip install no-such-package\n"


def test_the_folders_of_a_recipe_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    words = ["model.path=m", "data.sources=[{path: x.json}]", f"run.dir={tmp_path}/file/run"]
    assert cli.main(["doctor", *words]) == 2
    assert f"run.dir: {tmp_path}/file/run: {tmp_path}/file is a file" in capsys.readouterr().err
