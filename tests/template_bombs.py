"""Templates that would take hours or all memory, each in a child with limits of its own.

    python tests/template_bombs.py < {name: template} as JSON      {name: [seconds, MiB, refusal or null]} as JSON
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message

CPU_SECONDS = 30
BYTES = 600 << 20
TALK = Conversation((Message("user", "hello"), Message("assistant", "wörld 🎉")))


def main() -> None:
    json.dump({name: explode(text) for name, text in json.load(sys.stdin).items()}, sys.stdout)


def explode(text: str) -> tuple[float, float, str | None]:
    """CPU seconds, MiB beyond those of the process before, and the refusal, of one template in a forked child."""
    answers, writes = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes() + BYTES, resource.RLIM_INFINITY))
        os.write(writes, json.dumps(refusal(text)).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(answers, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(answer)) if answer else (float(CPU_SECONDS), 0.0, "killed")


def refusal(text: str) -> tuple[float, float, str | None]:
    started, before = time.process_time(), peak_mib()
    try:
        render(compile_template(text), TALK, {"bos_token": "<s>"})
        said = None
    except (BadRecord, ConfigError) as error:
        said = str(error)[:300]
    except MemoryError:
        said = "out of memory"
    return time.process_time() - started, peak_mib() - before, said


def used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def peak_mib() -> float:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main()
