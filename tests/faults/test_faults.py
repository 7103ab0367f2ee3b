"""Faults in real runs, and not one bit differs afterwards. Programs fork the runs, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, environment

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run_program(name: str, *arguments: str, seconds: float) -> str:
    """What tests/faults/NAME printed; fails with its output unless it exits 0."""
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests", "tests/faults"))
    command = [sys.executable, str(HERE / name), *arguments]
    done = subprocess.run(command, env=environment(PYTHONPATH=paths), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def kills(folder: Path, number: int, *arguments: str, seconds: float) -> None:
    """`number` kills or more, at least 30 % of them inside a save."""
    printed = run_program("kills.py", str(folder), "--kills", str(number), *arguments, seconds=seconds)
    print(printed)
    found = json.loads(printed.splitlines()[-1])
    assert found["kills"] >= number
    assert found["in_save"] >= 0.3 * found["kills"]


@pytest.mark.timeout(900)
def test_forty_kills_change_no_bit(tmp_path: Path) -> None:
    kills(tmp_path, 40, seconds=900)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_two_hundred_kills_over_the_whole_matrix_change_no_bit(tmp_path: Path) -> None:
    kills(tmp_path, 200, "--all", seconds=7200)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_saves_and_not_the_run(tmp_path: Path) -> None:
    assert run_program("storage.py", str(tmp_path), seconds=300).count("as promised") == 4


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_a_save_struck_at_each_of_its_system_calls_is_whole_or_not_there(tmp_path: Path) -> None:
    printed = run_program("syscalls.py", str(tmp_path), seconds=300)
    print(printed)
    assert sum(line.startswith("killed at") for line in printed.splitlines()) == 7
    assert sum("the next save worked" in line for line in printed.splitlines()) == 20


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_no_power_cut_in_a_save_costs_more_than_that_save(tmp_path: Path) -> None:
    printed = run_program("powercut.py", str(tmp_path), seconds=300)
    assert printed.count("a whole checkpoint in each") == 3, printed
    assert printed.count("the promise is broken, found after") == 5, printed


def test_a_folder_has_one_writer_however_two_of_them_race(tmp_path: Path) -> None:
    assert len(run_program("races.py", str(tmp_path), seconds=300).splitlines()) == 4


def test_signals_to_any_process_in_any_phase_stop_in_order(tmp_path: Path) -> None:
    # With this seed the eight have each signal, target and phase twice, and a request to stop in every phase.
    printed = run_program("stops.py", str(tmp_path), "--cells", "8", "--seed", "1121", seconds=600)
    assert printed.count("the same bits") == 11, printed


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_every_signal_to_every_process_in_every_phase_stops_in_order(tmp_path: Path) -> None:
    assert run_program("stops.py", str(tmp_path), seconds=3600).count("the same bits") == 67


def test_a_rank_that_no_longer_moves_is_found_and_named(tmp_path: Path) -> None:
    """What tests/e2e/test_hang.py and tests/unit/test_local.py have not."""
    cases = ("in another collective", "segmentation fault", "stuck reader")
    assert run_program("hangs.py", str(tmp_path), *cases, seconds=600).count("the same bits afterwards") == 3


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_rank_that_no_longer_moves_in_any_way_is_found_and_named(tmp_path: Path) -> None:
    assert run_program("hangs.py", str(tmp_path), seconds=1200).count("the same bits afterwards") == 7


def test_nothing_gets_in_and_no_secret_gets_out(tmp_path: Path) -> None:
    quick = ("sockets", "secrets", "umask", "open_folder", "weights_in_pickles", "remote_code")
    assert run_program("security.py", str(tmp_path), *quick, seconds=600).count(": kept") == len(quick)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_no_file_of_a_run_can_carry_code(tmp_path: Path) -> None:
    assert ": kept" in run_program("security.py", str(tmp_path), "payloads", seconds=3600)


def test_what_a_run_was_made_from_may_not_change_under_it(tmp_path: Path) -> None:
    assert run_program("touches.py", str(tmp_path), seconds=300).count("refused by name with both values") == 8
