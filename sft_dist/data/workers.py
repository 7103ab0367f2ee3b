"""Processes that do one thing to many tasks, in order, while the caller reads on.

    with Workers(action, num=4) as workers:
        for task, result in workers.map(tasks): ...

Each worker is a fresh interpreter that talks through its own pipes: nothing is forked, whatever threads or libraries
the caller has started, and a worker ends when its standard input does, which is when the caller ends, however that
happens. With `num=0` everything is done here.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

from sft_dist.errors import DataError, SftError

KeyT = TypeVar("KeyT")

_AHEAD = 2  # tasks per worker that are read before the first of them is finished


class Workers:
    """`num` processes that apply `action`, which must be picklable. They start with their first task."""

    def __init__(self, action: Callable[[Any], Any], num: int) -> None:
        self._action, self._num = action, num
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(max(num, 1), thread_name_prefix="sft-worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()

    def map(self, tasks: Iterable[tuple[KeyT, Any]]) -> Iterator[tuple[KeyT, Any]]:
        """(key, result) for each (key, task) in order; a task None gives the result None.

        Raises what `action` raised at its place, and what `tasks` raised behind everything that came before it.
        """
        under_way: deque[tuple[KeyT, Future[Any]]] = deque()
        given, failure = iter(tasks), None
        while True:
            try:
                key, task = next(given)
            except StopIteration:
                break
            except SftError as error:
                failure = error
                break
            under_way.append((key, self._start(task)))
            while len(under_way) > self._num * _AHEAD:
                yield _finished(*under_way.popleft())
        while under_way:
            yield _finished(*under_way.popleft())
        if failure is not None:
            raise failure

    def _start(self, task: Any) -> Future[Any]:
        if self._num and task is not None:
            return self._threads.submit(self._ask, task)
        done: Future[Any] = Future()
        done.set_result(None if task is None else self._action(task))
        return done

    def _ask(self, task: Any) -> Any:
        """One task through this thread's process."""
        if not hasattr(self._local, "process"):
            self._local.process = self._launch()
        process = self._local.process
        try:
            _send(process.stdin, task)
            kind, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = process.wait()
            raise DataError(
                f"a process that prepares data died with exit code {code} (-9: often too little memory); "
                "lower data.workers and run again: what is done stays done"
            ) from error
        if kind == "error":
            raise value
        return value

    def _launch(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sft_dist.data.workers"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self._processes.append(process)
        _send(process.stdin, sys.path)
        _send(process.stdin, self._action)
        return process


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """A worker's life: the action first, then tasks until the pipe ends."""
    sys.path[:] = pickle.load(requests)  # before the action, which is found through it
    action = pickle.load(requests)
    gc.freeze()  # what the libraries hold stays: no collection need go through it
    while True:
        try:
            task = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = "done", action(task)
        except SftError as error:
            reply = "error", error
        _send(replies, reply)


def _send(pipe: Any, value: Any) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _finished(key: KeyT, future: Future[Any]) -> tuple[KeyT, Any]:
    return key, future.result()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between the answers
    serve(sys.stdin.buffer, answers)
