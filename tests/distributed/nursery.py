"""Forks ranks: the libraries, which take seconds of every process's start, are imported once for all launches.

Reads launches as lines of JSON from stdin, {script, arguments, ranks: [{environment, output}], seconds}, and answers
each with a line {codes}: the exit code of every rank, those that were killed included: at the end of the time, or
SIBLING_SECONDS after the first that failed, since the others may wait for it in vain. It never
computes anything itself, since a process that has started torch's thread pool cannot be forked safely.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
SIBLING_SECONDS = 10.0  # for the ranks beside one that failed to say what they saw of it


def main() -> None:
    import_libraries()
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        launch = json.loads(line)
        pids = [fork(launch, rank) for rank in launch["ranks"]]
        codes = wait(pids, time.monotonic() + launch["seconds"])
        answers.write(json.dumps({"codes": [codes[pid] for pid in pids]}) + "\n")
        answers.flush()


def import_libraries() -> None:
    """What the workers of this folder use. deepspeed decides about its devices while it is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import sft_dist.layout_certificate
    import sft_dist.parallel.zero
    import sft_dist.worker  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage again and again: no rank need go through what the libraries hold


def die_with_parent() -> None:
    """The kernel ends this process when the one that forked or started it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(launch: dict[str, Any], rank: dict[str, Any]) -> int:
    """The id of a process that runs the script as `python SCRIPT ARGUMENTS` would."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        out = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(out, number)
        os.environ.clear()
        os.environ.update(rank["environment"])
        sys.argv = [launch["script"], *launch["arguments"]]
        sys.path.insert(0, str(Path(launch["script"]).parent))
        runpy.run_path(launch["script"], run_name="__main__")
        code = 0
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def wait(pids: list[int], deadline: float) -> dict[int, int]:
    """Exit code by process; what is still there at the deadline, or some time after a failure, is killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + SIBLING_SECONDS)
        left = deadline - time.monotonic()
        if len(codes) < len(pids) and left > 0:
            signal.sigtimedwait([signal.SIGCHLD], left)
        elif left <= 0:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return codes


if __name__ == "__main__":
    main()
