"""What tests of forked ranks and commands stand on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

import pytest
from line_server import LineServer

SCRIPT = """
import json, os, signal, sys
for line in sys.stdin:
    if json.loads(line) == "slow":
        os.kill(os.getppid(), signal.SIGUSR1)
        signal.pause()
    print(json.dumps([os.getpid(), json.loads(line)]), flush=True)
"""


def test_the_answer_that_a_stopped_test_did_not_wait_for_is_nobody_elses(tmp_path: Path) -> None:
    """pytest-timeout raises while a command runs: its exit code would come first to whoever asks next."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    (tmp_path / "server.py").write_text(SCRIPT)
    server, before = LineServer(tmp_path / "server.py", os.environ), signal.signal(signal.SIGUSR1, give_up)
    try:
        (first, _), (same, _) = server.ask(1), server.ask(2)
        with pytest.raises(TimeoutError):
            server.ask("slow")
        second, said = server.ask(3)
    finally:
        signal.signal(signal.SIGUSR1, before)
        server.end()
    assert first == same != second and said == 3
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
