"""What tests of whole runs stand on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny_run


def test_the_answer_that_a_stopped_test_did_not_wait_for_is_no_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-timeout raises while a command runs: its exit code would come first to whoever asks next."""
    killed: list[Any] = []

    class Slow:
        def run(self, words: tuple[str, ...]) -> tuple[int, str]:
            raise TimeoutError

        def kill(self) -> None:
            killed.append(self)

    monkeypatch.setattr(tiny_run, "_server", cache(Slow))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            tiny_run.command("train")
    assert len(set(killed)) == 2
