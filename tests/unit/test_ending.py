"""The end of a worker: its code, what was registered for the end, all its output."""

from __future__ import annotations

import subprocess
import sys
import traceback
import weakref

import pytest

from sft_dist.resilience.ending import letting_go

PROGRAM = """
import atexit, sys
from sft_dist.resilience.ending import run_and_end
atexit.register(lambda: print("registered"))
def main():
    sys.stdout.write("unflushed ")
    {body}
run_and_end(main)
"""


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_the_code_is_that_of_main_and_nothing_is_left_unsaid(body: str, code: int, told: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "unflushed registered\n"), ended.stderr
    assert told in ended.stderr


def test_the_interpreter_is_not_taken_down_around_living_threads() -> None:
    """What runs in Python's own end, behind the registered calls, would run beside gloo's threads."""
    body = "import builtins; builtins.last = type('Last', (), {'__del__': lambda self: print('taken down')})()"
    program = PROGRAM.format(body=body)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    ordinary = subprocess.run(
        [sys.executable, "-c", program.replace("run_and_end(main)", "main()")], capture_output=True, text=True
    )
    assert "taken down" in ordinary.stdout and "taken down" not in ended.stdout


def test_an_error_holds_nothing_of_the_frames_it_came_through() -> None:
    class Wrapper:
        pass

    seen: list[weakref.ref[Wrapper]] = []

    def work() -> None:
        wrapper = Wrapper()
        seen.append(weakref.ref(wrapper))
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second") as caught, letting_go():
        work()
    assert seen[0]() is None
    assert "in work" in "".join(traceback.format_exception(caught.value))
