"""A rank that fails in a test ends its siblings soon, and is the one that is told of."""

from __future__ import annotations

import os
import signal
import time

import harness
import nursery
import pytest


def child(code: int | None) -> int:
    """A process that leaves with `code`, or waits for a signal."""
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        if code is None:
            signal.pause()
        os._exit(code or 0)
    return pid


@pytest.mark.parametrize(("code", "seconds", "codes"), [(3, 60.0, [3, -9]), (0, 0.2, [0, -9])])
def test_siblings_of_a_failed_rank_are_not_waited_for_for_long(
    monkeypatch: pytest.MonkeyPatch, code: int, seconds: float, codes: list[int]
) -> None:
    monkeypatch.setattr(nursery, "SIBLING_SECONDS", 0.2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        pids, started = [child(code), child(None)], time.monotonic()
        found = nursery.wait(pids, started + seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert [found[pid] for pid in pids] == codes
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("codes", "first"), [([-9, 1, 0], 1), ([1, -6, -9], 1), ([0, -9, -9], 1), ([-9, 0, 2], 2), ([1, 1, -9], 0)]
)
def test_the_rank_that_failed_by_itself_is_told_first_and_all_are_told(codes: list[int], first: int) -> None:
    outputs = ["x" * 5000 + "zero", "x" * 5000 + "one", "x" * 5000 + "two"]
    with pytest.raises(AssertionError, match=f"^rank {first} of 3 exited {codes[first]}:\nx{{5000}}") as caught:
        harness._checked(3, codes, outputs)
    assert all(word in str(caught.value) for word in ("zero", "one", "two")) and len(str(caught.value)) < 10_000


def test_outputs_of_ranks_that_ended_well_are_given() -> None:
    assert harness._checked(2, [0, 0], ["a", "b"]) == ["a", "b"]
