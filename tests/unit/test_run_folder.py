"""Claims: attempts count up, stale stop files go, exit codes reach both places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_dist.errors import LockedError
from sft_dist.resilience.run_folder import append_event, claim, last_attempt, read_exit_code, write_exit_code


def test_attempts_count_up_and_record_their_command(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        taken = claim(tmp_path / "run", ["sft-dist", "train", "a b.yaml"])
        assert (taken.attempt, taken.attempt_dir) == (number, tmp_path / "run" / "logs" / f"attempt_000{number}")
        assert (taken.attempt_dir / "command.txt").read_text() == "sft-dist train 'a b.yaml'\n"
        taken.lock.release()
    assert last_attempt(tmp_path / "run") == 3


def test_a_claimed_folder_cannot_be_claimed_again(tmp_path: Path) -> None:
    taken = claim(tmp_path, ["one"])
    with pytest.raises(LockedError):
        claim(tmp_path, ["two"], wait_seconds=0)
    assert last_attempt(tmp_path) == 1
    taken.lock.release()


def test_a_stop_file_that_an_earlier_attempt_has_obeyed_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("")
    claim(tmp_path, ["x"]).lock.release()
    assert not (tmp_path / "stop").exists()


def test_exit_code_goes_to_the_attempt_and_where_worker_sh_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_exit_code(tmp_path) is None
    monkeypatch.setenv("SFT_EXIT_CODE_FILE", str(tmp_path / "elsewhere" / "code"))
    write_exit_code(tmp_path, 75)
    assert read_exit_code(tmp_path) == 75
    assert (tmp_path / "elsewhere" / "code").read_text() == "75\n"
    write_exit_code(None, 2)
    assert (tmp_path / "elsewhere" / "code").read_text() == "2\n"
    assert read_exit_code(tmp_path) == 75


def test_another_node_that_writes_the_exit_code_meanwhile_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes between our write and our rename."""
    rename = Path.replace

    def replace(partial: Path, path: Path) -> None:
        with monkeypatch.context() as other:
            other.setattr(Path, "replace", rename)
            other.setattr("socket.gethostname", lambda: "another")
            write_exit_code(tmp_path, 71)
        rename(partial, path)

    monkeypatch.setattr(Path, "replace", replace)
    write_exit_code(tmp_path, 71)
    assert read_exit_code(tmp_path) == 71 and capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["exit_code"]


def test_events_are_json_lines(tmp_path: Path) -> None:
    append_event(tmp_path, "start", processes=2)
    append_event(tmp_path, "end", code=0)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("processes"), line.get("code")) for line in lines] == [
        ("start", 2, None),
        ("end", None, 0),
    ]
