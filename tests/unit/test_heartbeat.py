"""Signs of life and what is read from them: their cost, how long silence may last, who is to blame, when to restart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.launch.restarts import Ending, Restarts, newest_step
from sft_dist.resilience.heartbeat import HEARTBEATS_VARIABLE, PHASES, Beat, Heart, Heartbeats
from sft_dist.resilience.stacks import Frame, StackMemory, main_thread
from sft_dist.resilience.watchdog import LONGEST_SECONDS, Watchdog, Witness, accuse, odd_group, patience_seconds


def beat(step: int, phase: str = "train", seconds: float = 0.0, first_step: int = 1) -> Beat:
    return Beat(step, phase, seconds, first_step)


# ---- the shared memory


def test_each_rank_has_its_own_record_and_none_before_its_first_sign() -> None:
    shared = Heartbeats(3)
    Heart(shared.memory, 1).beat(7, "save")
    Heart(shared.memory, 2).beat(8, "train")
    assert (shared.read(0).step, shared.read(0).phase) == (0, "start")
    assert (shared.read(1).step, shared.read(1).phase) == (7, "save")
    assert (shared.read(2).step, shared.read(2).phase) == (8, "train")
    assert abs(shared.read(2).seconds - time.monotonic()) < 10
    shared.close()


def test_the_first_step_is_that_of_the_attempt() -> None:
    shared = Heartbeats(1)
    heart = Heart(shared.memory, 0)
    for step, phase in ((0, "build"), (41, "data"), (42, "data")):
        heart.beat(step, phase)
    assert (shared.read(0).first_step, shared.read(0).step) == (41, 42)
    shared.close()


def test_a_worker_beats_into_the_inherited_memory_and_elsewhere_into_its_own() -> None:
    program = "from sft_dist.resilience.heartbeat import heart; heart().beat(5, 'evaluate')"
    shared = Heartbeats(2)
    environment = os.environ | {"SFT_HEARTBEATS": str(shared.fd), "LOCAL_RANK": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, pass_fds=(shared.fd,), check=True)
    assert (shared.read(1).step, shared.read(1).phase) == (5, "evaluate")
    assert shared.read(0).step == 0
    shared.close()
    alone = {name: value for name, value in os.environ.items() if name != "SFT_HEARTBEATS"}
    subprocess.run([sys.executable, "-c", program], env=alone | {"RANK": "1"}, check=True)


def test_a_beat_costs_less_than_ten_microseconds() -> None:
    heart = Heart(Heartbeats(1).memory, 0)
    started = time.perf_counter()
    for step in range(10_000):
        heart.beat(step, "train")
    assert (time.perf_counter() - started) / 10_000 < 10e-6


# ---- how long silence may last


@pytest.mark.parametrize(
    ("hang_seconds", "step_seconds", "expected"),
    [
        ("auto", [0.1, 0.1], 60.0),
        ("auto", [20.0, 21.0, 300.0], 210.0),
        ("auto", [500.0], 600.0),
        ("auto", [], 1800.0),
        (5.0, [0.1], 5.0),
        (5.0, [], 1800.0),
        (3600.0, [], 3600.0),
    ],
)
def test_patience_in_a_step(hang_seconds: float, step_seconds: list[float], expected: float) -> None:
    assert patience_seconds("train", hang_seconds, step_seconds) == expected
    assert patience_seconds("data", hang_seconds, step_seconds) == expected


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in ("data", "train")])
def test_other_phases_may_take_longer(phase: str) -> None:
    assert patience_seconds(phase, 5.0, [0.1]) == LONGEST_SECONDS[phase] >= 1800
    assert patience_seconds(phase, 3600.0, [0.1]) == 36_000


def watch(watchdog: Watchdog, beats: dict[int, Beat], since: float, until: float, every: float = 0.5) -> float | None:
    """Look at the same signs again and again; the time of the first alarm."""
    now = since
    while now < until:
        now += every
        if watchdog.finds_hang(beats, now):
            return now
    return None


def test_a_hang_is_found_within_one_look_of_the_limit() -> None:
    watchdog = Watchdog(5.0, 0.0)
    for step in range(1, 11):
        assert not watchdog.finds_hang({0: beat(step), 1: beat(step)}, step * 0.1)
    found = watch(watchdog, {0: beat(10), 1: beat(10)}, 1.0, 20.0)
    assert found is not None and 6.0 < found <= 6.5 + 0.5


def test_auto_learns_from_the_steps_and_forgets_a_slow_first_one() -> None:
    watchdog, now = Watchdog("auto", 0.0), 0.0
    for step in range(1, 30):
        for _ in range(24 if step > 1 else 200):  # twelve seconds a step, the first a hundred
            now += 0.5
            assert not watchdog.finds_hang({0: beat(step)}, now)
    found = watch(watchdog, {0: beat(29)}, now, now + 300)
    assert found is not None and 105 < found - now < 125


def test_one_rank_that_moves_keeps_the_run_alive() -> None:
    watchdog = Watchdog(5.0, 0.0)
    watchdog.finds_hang({0: beat(2), 1: beat(2)}, 0.5)
    for look in range(100):
        assert not watchdog.finds_hang({0: beat(2, "train", look), 1: beat(2)}, 1.0 + look)


def test_the_longest_phase_of_any_rank_decides() -> None:
    watchdog = Watchdog(5.0, 0.0)
    beats = {0: beat(9, "save"), 1: beat(9, "train")}
    assert watch(watchdog, beats, 0.0, 1000.0) is None


@given(st.floats(10.0, 1e6))
def test_time_in_which_the_whole_job_was_stopped_is_nobodys_silence(stopped_seconds: float) -> None:
    watchdog = Watchdog(5.0, 0.0)
    watchdog.finds_hang({0: beat(3)}, 0.5)
    assert not watchdog.finds_hang({0: beat(3)}, 0.5 + stopped_seconds)


def test_ranks_that_have_all_ended_are_no_hang() -> None:
    watchdog = Watchdog(5.0, 0.0)
    assert watch(watchdog, {}, 0.0, 100.0) is None


# ---- who holds it up

INSIDE = Frame("/env/site-packages/torch/distributed/c10d.py", 7, "all_reduce")
WAIT, SEND, READ = Frame("/x/c.py", 9, "all_reduce"), Frame("/x/c.py", 30, "send"), Frame("/x/d.py", 3, "read")


@pytest.mark.parametrize(
    ("witnesses", "expected"),
    [
        pytest.param([(5, "train", WAIT), (5, "train", WAIT), (4, "train", WAIT)], [2], id="behind"),
        pytest.param([(5, "train", WAIT), (5, "data", READ), (5, "train", WAIT)], [1], id="other phase"),
        pytest.param([(5, "train", SEND), (5, "train", WAIT), (5, "train", WAIT)], [0], id="other collective"),
        pytest.param([(5, "train", WAIT), (5, "train", None)], [1], id="stopped, of two"),
        pytest.param([(6, "train", None), (5, "train", WAIT)], [0], id="stopped, ahead of the other"),
        pytest.param([(5, "train", WAIT), (4, "train", READ)], [1], id="behind, of two"),
        pytest.param([(5, "train", INSIDE), (5, "train", READ)], [1], id="not waiting, of two"),
        pytest.param([(5, "train", READ), (5, "train", INSIDE)], [0], id="not waiting, of two, the other way round"),
        pytest.param([(5, "train", WAIT), (5, "train", WAIT)], [], id="all in the same place"),
        pytest.param([(5, "train", WAIT)], [], id="alone"),
    ],
)
def test_the_odd_ones_out(witnesses: list[tuple[int, str, Frame | None]], expected: list[int]) -> None:
    found = odd_group(
        [
            Witness(rank, beat(step, phase), (frame,) if frame else ())
            for rank, (step, phase, frame) in enumerate(witnesses)
        ]
    )
    assert [w.rank for w in found] == expected


def test_the_accusation_is_one_line_for_many_ranks() -> None:
    witnesses = [Witness(rank, beat(5), (WAIT,)) for rank in range(64)]
    witnesses[17] = Witness(17, beat(4, "data"), (READ,))
    assert accuse(witnesses, 61.4) == (
        "hang: no sign of life for 61 s; odd one out is rank 17: step 4, data, at d.py:3 in read; "
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 55 more: step 5, train, at c.py:9 in all_reduce"
    )


# ---- stacks


def test_stacks_are_written_on_the_signal_and_the_main_thread_is_told_from_others() -> None:
    program = """
import os, signal, threading, time
from sft_dist.resilience.stacks import answer_with_stacks
answer_with_stacks()
def in_a_thread(): time.sleep(60)
def in_the_main_thread(): os.kill(os.getpid(), signal.SIGUSR2)
threading.Thread(target=in_a_thread, daemon=True).start()
threading.Thread(target=in_a_thread, daemon=True).start()
time.sleep(0.1)
in_the_main_thread()
"""
    memory = StackMemory()
    environment = os.environ | {"SFT_STACKS": str(memory.fd)}
    subprocess.run([sys.executable, "-c", program], env=environment, pass_fds=(memory.fd,), check=True)
    text = memory.read()
    memory.close()
    assert text.count("in in_a_thread") == 2
    assert [frame.function for frame in main_thread(text)] == ["in_the_main_thread", "<module>"]
    assert str(main_thread(text)[0]) == "<string>:6 in in_the_main_thread"
    assert main_thread("") == ()


# ---- restarts


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending(71, "hang"), True),
        (Ending(74, "storage"), True),
        (Ending(1, "killed", killed_by=9), True),
        (Ending(1, "crashed", killed_by=11), True),
        (Ending(1, "asked", killed_by=15), False),
        (Ending(1, "a traceback"), False),
        (Ending(70, "NaN", killed_by=9), False),
        *((Ending(code, "final"), False) for code in (0, 2, 65, 70, 73, 75, 76)),
    ],
)
def test_what_may_pass_by_itself(ending: Ending, expected: bool) -> None:
    assert ending.may_pass is expected


@pytest.mark.parametrize(
    ("allowed", "steps", "expected"),
    [
        pytest.param(9, [0, 0, 0, 0], [None, None, None, 76], id="no progress"),
        pytest.param(3, [0, 0, 0, 0], [None, None, None, 76], id="no progress, and no restart left"),
        pytest.param(9, [0, 0, 5, 5, 5, 5], [None, None, None, None, None, 76], id="progress starts the count again"),
        pytest.param(3, [5, 6, 7, 8], [None, None, None, 71], id="progress, and no restart left"),
        pytest.param(1, [0, 0], [None, 71], id="one restart"),
        pytest.param(0, [5], [71], id="none"),
    ],
)
def test_restarts_end(allowed: int, steps: list[int], expected: list[int | None]) -> None:
    restarts = Restarts(allowed, newest_step=0)
    assert [restarts.refuse(Ending(71, "hang"), step) for step in steps] == expected


def test_a_checkpoint_of_before_the_launch_is_no_progress(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000090", "step-00000100", "step-00000200.bad-1", ".tmp-abc"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 100
    restarts = Restarts(9, newest_step(tmp_path))
    assert [restarts.refuse(Ending(71, "hang"), 100) for _ in range(4)] == [None, None, None, 76]


def test_the_runtime_knows_the_watchdog_by_the_same_name() -> None:
    from sft_dist.parallel.runtime import WATCHED_VARIABLE

    assert WATCHED_VARIABLE == HEARTBEATS_VARIABLE
