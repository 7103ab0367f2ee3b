"""Stop requests: every signal and both files set the flag; the second SIGINT ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_dist.resilience.signals import STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_sets_the_flag_and_the_former_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.reason == number.name
    assert signal.getsignal(number) == before


def test_an_ignored_signal_is_taken_over() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_file_sets_the_flag(tmp_path: Path) -> None:
    stop = StopFlag([tmp_path / "stop"])
    assert not stop
    (tmp_path / "stop").write_text("")
    assert stop and stop.reason == f"stop file {tmp_path / 'stop'}"


def test_the_stop_file_of_worker_sh_sets_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_STOP_FILE", str(tmp_path / "elsewhere"))
    stop = StopFlag([tmp_path / "stop"])
    (tmp_path / "elsewhere").write_text("")
    assert stop


def test_the_second_interrupt_ends_the_process_even_in_native_code() -> None:
    program = (
        "import ctypes, os, signal\n"
        "from sft_dist.resilience.signals import StopFlag\n"
        "stop = StopFlag().install()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print(bool(stop), flush=True)\n"
        "ctypes.PyDLL(None).pause()\n"  # holds the interpreter lock: no Python handler could run
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_a_request_from_inside_keeps_the_first_reason() -> None:
    stop = StopFlag()
    stop.request("time limit")
    stop.request("later")
    assert stop and stop.reason == "time limit"
