"""Processes that do one thing to many tasks, in order, while the caller reads on.

    with Workers(action, num=4) as workers:
        for task, result in workers.map(tasks): ...

The workers are forks of one fresh interpreter (`fork_server`), which imports what `action` needs once for all of them.
Nothing of the caller is forked, whatever threads or libraries it has started, and workers end when it does, however
that happens. With `num=0` everything is done here.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from sft_dist.data.fork_server import send
from sft_dist.errors import DataError, SftError

KeyT = TypeVar("KeyT")

_AHEAD = 2  # tasks per worker that are read before the first of them is finished

ONE_THREAD = {  # libraries that would start more of them: who has several must not fork, and cores go to workers
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of the allocator that pyarrow brings
}


def _nothing() -> None:
    """What there is to do before workers are forked, if there is nothing."""


class Workers:
    """`num` processes that apply `action`. They start with the first task.

    `before` is called once, in the process that they are forks of: what it sets up, all of them have. Both must be
    picklable; what they share is one object there too.
    """

    def __init__(self, action: Callable[[Any], Any], num: int, before: Callable[[], None] = _nothing) -> None:
        self._action, self._num, self._before = action, num, before
        self._server: _Server | None = None
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(num, 1), thread_name_prefix="sft-worker")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            self._server.end()

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
            if self._server is None:
                self._server = _Server(self._action, self._before, self._num)
                self._threads.submit(self._server.start)
                for number in range(self._num):
                    self._idle.put(number)
            return self._threads.submit(self._ask, self._server, task)
        done: Future[Any] = Future()
        done.set_result(None if task is None else self._action(task))
        return done

    def _ask(self, server: _Server, task: Any) -> Any:
        """One task through a worker that has nothing to do: there are as many threads as workers."""
        number = self._idle.get()
        try:
            kind, value = server.ask(number, task)
        finally:
            self._idle.put(number)
        if kind == "error":
            raise value
        return value


class _Server:
    """The process that the workers are forks of, and a pair of files to talk with each of them."""

    def __init__(self, action: Callable[[Any], Any], before: Callable[[], None], num: int) -> None:
        env = os.environ | ONE_THREAD
        self._sockets, theirs = zip(*(socket.socketpair() for _ in range(num)), strict=True)
        numbers = [end.fileno() for end in theirs]
        command = [sys.executable, "-m", "sft_dist.data.fork_server", *map(str, numbers)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=env, pass_fds=numbers, stdin=pipe, stdout=pipe)
        for end in theirs:
            end.close()
        self._files = [(ours.makefile("wb"), ours.makefile("rb")) for ours in self._sockets]
        self._lock = threading.Lock()  # held by who talks with the server itself
        self._given = action, before

    def start(self) -> None:
        """Give it what it needs, which waits while it imports that. If it has died, the first question tells."""
        with self._lock, suppress(BrokenPipeError):
            send(self._process.stdin, sys.path)
            send(self._process.stdin, self._given)

    def ask(self, number: int, task: Any) -> Any:
        """What worker `number` answers. Raises DataError when it is dead."""
        tasks, results = self._files[number]
        try:
            send(tasks, task)
            return pickle.load(results)
        except (EOFError, pickle.UnpicklingError, BrokenPipeError, ConnectionResetError) as error:
            raise DataError(
                f"a process that prepares data died with exit code {self._exit_code(number)} (-9: often too little "
                "memory); lower data.workers and run again: what is done stays done"
            ) from error

    def _exit_code(self, number: int) -> int:
        """Of a worker that has ended; of the server, if that has."""
        with self._lock:
            try:
                send(self._process.stdin, number)
                code: int = pickle.load(self._process.stdout)  # type: ignore[arg-type]
            except (EOFError, BrokenPipeError):
                code = self._process.wait()
        return code

    def end(self) -> None:
        """Kill the workers, whatever they are at."""
        with self._lock:
            with suppress(BrokenPipeError):  # it has ended
                self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
        for one in self._sockets:
            with suppress(OSError):  # the other end is closed
                one.shutdown(socket.SHUT_RDWR)  # ends a worker whose server was killed, and whoever waits for an answer


def _finished(key: KeyT, future: Future[Any]) -> tuple[KeyT, Any]:
    return key, future.result()
