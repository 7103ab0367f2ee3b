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
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from sft_dist.errors import SftError


class WithoutPandas:
    """Finds no pandas. Where it is installed, pyarrow imports it to ask of every argument whether it is from there: no
    argument is, and the import would take a fifth of a second in every worker."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("workers do without pandas", name=name)


def serve(requests: BinaryIO, answers: BinaryIO, sockets: list[int]) -> None:
    """The server's life."""
    workers: list[int] = []  # their pids
    codes: dict[int, int] = {}  # of those that were asked for
    try:
        sys.path[:] = pickle.load(requests)  # before the action, which is found through it
        action, before = pickle.load(requests)
        before()
        gc.freeze()  # what the libraries hold stays, in pages that all workers share: no collection goes through it
        workers += [_fork(action, number, sockets, (requests, answers)) for number in range(len(sockets))]
        for one in sockets:
            os.close(one)
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
            threading.Thread(target=_end_with, args=(own,), daemon=True).start()
            _work(action, own.makefile("rb"), own.makefile("wb"))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with(own: socket.socket) -> None:
    """End this process when the other end of its socket is closed, whatever it is at and whether the server lives."""
    poll = select.poll()
    poll.register(own, 0)  # the end of it is told in any case
    poll.poll()
    os._exit(0)


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
    sys.meta_path.insert(0, WithoutPandas)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the caller, who ends this process and its workers
    given, to_caller = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    serve(given, to_caller, [int(word) for word in sys.argv[1:]])
