"""A fresh interpreter that reads what to do, imports what that needs, and forks the workers that do it.

    python -m sft_dist.data.fork_server 7 8        one worker at each of these inherited sockets

    standard input      sys.path; (action, what to do before forking); then numbers of workers that ended
    standard output     for each of these numbers the worker's exit code
    each socket         tasks in, ("done", result) or ("error", exception) out

Nothing of the process that starts it is forked, whatever threads and libraries that one has; and at the moment of a
fork this one has no thread but its own. A worker ends when its socket does, which is when the caller ends, however that
happens; when standard input ends first, the workers are killed.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from sft_dist.errors import SftError


def serve(requests: BinaryIO, answers: BinaryIO, sockets: list[int]) -> None:
    """The server's life."""
    sys.path[:] = pickle.load(requests)  # before the action, which is found through it
    action, before = pickle.load(requests)
    before()
    gc.freeze()  # what the libraries hold stays, in pages that all workers share: no collection need go through it
    workers = [_fork(action, number, sockets, (requests, answers)) for number in range(len(sockets))]
    codes: dict[int, int] = {}
    for one in sockets:
        os.close(one)
    try:
        while True:
            number = pickle.load(requests)
            if number not in codes:
                codes[number] = os.waitstatus_to_exitcode(os.waitpid(workers[number], 0)[1])
            send(answers, codes[number])
    except EOFError:
        for pid in (pid for number, pid in enumerate(workers) if number not in codes):
            os.kill(pid, signal.SIGKILL)  # it was not waited for yet, so nobody else can have its number
            os.waitpid(pid, 0)


def _fork(action: Callable[[Any], Any], number: int, sockets: list[int], server: tuple[BinaryIO, BinaryIO]) -> int:
    """Start worker `number`; it keeps its own socket and no other descriptor of the server's. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for pipe in server:
            pipe.close()
        for other in sockets:
            if other != sockets[number]:
                os.close(other)
        with socket.socket(fileno=sockets[number]) as own:
            _work(action, own.makefile("rb"), own.makefile("wb"))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _work(action: Callable[[Any], Any], tasks: BinaryIO, results: BinaryIO) -> None:
    """A worker's life."""
    while True:
        try:
            task = pickle.load(tasks)
        except (EOFError, ConnectionResetError):
            return
        try:
            reply = "done", action(task)
        except SftError as error:
            reply = "error", error
        try:
            send(results, reply)
        except BrokenPipeError:
            return  # who asked has gone


def send(pipe: Any, value: Any) -> None:
    """Write a value that `pickle.load` reads at the other end."""
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the caller, who ends this process and its workers
    given, to_caller = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    serve(given, to_caller, [int(word) for word in sys.argv[1:]])
