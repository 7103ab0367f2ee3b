"""`sft-dist WORDS`, forked from one process that has imported the libraries: `python command_server.py`.

Reads lines of JSON from stdin, {words, environment, output, seconds}, and answers each with {code} when that command
has ended: all of the product but `exec`, which costs seconds of each process (see `forked`). Tests of what happens at a
process's start, or of a killed launcher, start a process of their own instead.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from forked import command, fork

from sft_dist.resilience.orphan import set_parent_death_signal


def obey(asked: dict[str, Any]) -> int:
    """The command, in the environment that it would have been started in."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    return command(asked["words"])


def main() -> None:
    set_parent_death_signal()  # else a killed pytest would leave the command that runs now, to its end
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed  # noqa: F401  # once, before the forks; it prints

    for line in sys.stdin:
        asked = json.loads(line)
        child = fork(lambda asked=asked: obey(asked), Path(asked["output"]))
        try:
            code = child.wait(asked["seconds"])
        except TimeoutError:
            child.send_signal(signal.SIGKILL)  # its ranks go with it
            code = child.wait()
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
