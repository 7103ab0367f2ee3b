"""A process that reads questions as lines of JSON and answers each with a line, started when it is first asked."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class LineServer:
    """`python SCRIPT`, which ends with its input. `environment` is read when it starts."""

    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        self._script, self._environment = script, environment
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: object) -> Any:
        """The answer. Who is interrupted while it waits (a test's time-out) ends the process: its answer is still to
        come, and would be taken for that of the next question."""
        process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, f"{self._script.name} ended with {process.wait()}"
        except BaseException:
            process.kill()
            self.end()
            raise
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(self._script)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=dict(self._environment), text=True, **pipes)
        atexit.register(self.end)
        return self._process

    def end(self) -> None:
        """Close its input and wait; it is started again when it is asked again."""
        if self._process is not None:
            process, self._process = self._process, None
            atexit.unregister(self.end)
            process.communicate()
