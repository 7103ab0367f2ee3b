"""The local launcher against tiny workers: exit codes, dying ranks, hangs, restarts, signals, no orphans, the lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_dist.errors import ConfigError, LockedError
from sft_dist.launch.hearing import Hearing
from sft_dist.launch.job import Job, choose_num_processes, count_gpus
from sft_dist.launch.local import end_hang, supervise
from sft_dist.launch.stops import TWICE_SECONDS, Stops
from sft_dist.resilience.heartbeat import Beat
from sft_dist.resilience.lock import RunLock
from sft_dist.resilience.run_folder import attempt_dir

# One worker: what it is told per rank as {"rank": [verb, value]} or {"attempt/rank": [verb, value]}. It takes ten steps
# of a few milliseconds first, and writes its pid before anything else.
WORKER = """
import ctypes, json, os, pathlib, signal, sys, time
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.stacks import answer_with_stacks
answer_with_stacks()
rank, plan, run_dir = os.environ["RANK"], json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
folder = run_dir / "logs" / f"attempt_{int(os.environ['SFT_ATTEMPT']):04d}"
(folder / f"pid_{rank}").write_text(str(os.getpid()))
print(f"rank {rank} speaks", flush=True)
print(f"rank {rank} complains", file=sys.stderr, flush=True)
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append("SIGTERM"))
signal.signal(signal.SIGUSR1, lambda *_: stops.append("SIGUSR1"))
signal.signal(signal.SIGINT, lambda *_: stops.append("SIGINT"))
(folder / f"ready_{rank}").touch()
while len(list(folder.glob("ready_*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
verb, value = plan.get(f"{os.environ['SFT_ATTEMPT']}/{rank}", plan.get(rank, plan["all"]))

def wait_in_a_collective():
    time.sleep(60)

def wait_in_another_collective():
    time.sleep(60)

for step in range(1, 11):
    heart().beat(step, "train")
    time.sleep(0.005)
if verb == "leave":
    if rank == "0" and value is not None:
        (folder / "exit_code").write_text(str(value))
elif verb == "exit":
    sys.exit(value)
elif verb == "kill":
    os.kill(os.getpid(), value)
elif verb == "die later":
    time.sleep(value)
    os.kill(os.getpid(), signal.SIGKILL)
elif verb == "save":
    (run_dir / "checkpoints" / f"step-{value:08d}").mkdir(parents=True, exist_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)
elif verb == "begin anew":
    from sft_dist.resilience.run_folder import put_aside
    put_aside(run_dir, 1)
    os.kill(os.getpid(), signal.SIGKILL)
elif verb == "collective":
    wait_in_a_collective()
elif verb == "other collective":
    wait_in_another_collective()
elif verb == "sleep":
    heart().beat(10, "data")
    time.sleep(60)
elif verb == "collective of nccl":
    pipe = os.environ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + rank + ".pipe"
    os.mkfifo(pipe)
    (folder / f"pipe_{rank}").write_text(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    heart().beat(10, "train")
    while not os.read(reader, 1):
        time.sleep(0.01)
    pathlib.Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + rank).write_text("record")
    time.sleep(60)
elif verb == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
elif verb == "holds the interpreter":
    ctypes.PyDLL(None).sleep(60)
elif verb == "ignore":
    time.sleep(60)
    time.sleep(60)
elif verb == "stop":
    while not stops:
        time.sleep(0.01)
    (folder / f"stopped_{rank}").write_text(stops[0])
    if rank == "0":
        (folder / "exit_code").write_text(str(value))
elif verb == "environment":
    names = [n for n in os.environ if n.startswith(("SFT_", "MASTER")) or n.endswith(("RANK", "WORLD_SIZE"))]
    (folder / f"environment_{rank}").write_text(json.dumps({n: os.environ[n] for n in names}))
    if rank == "0":
        (folder / "exit_code").write_text("0")
"""
# What `sft-dist train` does after it has resolved the recipe: claim, keep running, release.
LAUNCHER = """
import json, pathlib, sys
from sft_dist.config.schema import Recipe
from sft_dist.errors import SftError
from sft_dist.launch.local import keep_running
from sft_dist.resilience.run_folder import claim
run_dir, num, command, wait = pathlib.Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
sections = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}} | json.loads(sys.argv[5])
try:
    taken = claim(run_dir, sys.argv, wait_seconds=wait)
except SftError as error:
    print(f"sft-dist: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
sys.exit(keep_running(taken, Recipe.model_validate(sections), tuple(command), num, grace_seconds=1.0))
"""


class Launched:
    """A launcher in a process of its own."""

    def __init__(
        self,
        run_dir: Path,
        plan: dict[str, list[object]],
        num: int = 2,
        wait: float = 10.0,
        hang_seconds: float = 60.0,
        max_restarts: int = 0,
        resume: str = "auto",
    ) -> None:
        self.run_dir, self.num = run_dir, num
        resilience = {"hang_seconds": hang_seconds, "max_restarts": max_restarts}
        sections = json.dumps({"resilience": resilience, "checkpoint": {"resume": resume}})
        command = [sys.executable, "-c", WORKER, json.dumps(plan), str(run_dir)]
        words = [sys.executable, "-c", LAUNCHER, str(run_dir), str(num), json.dumps(command), str(wait), sections]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def folder(self) -> Path:
        return attempt_dir(self.run_dir, 1)

    def wait_ready(self) -> list[int]:
        """Until all workers have their handlers; returns their process ids."""
        wait_for(lambda: all((self.folder / f"ready_{rank}").exists() for rank in range(self.num)))
        return [int((self.folder / f"pid_{rank}").read_text()) for rank in range(self.num)]

    def attempts(self) -> list[Path]:
        return sorted((self.run_dir / "logs").iterdir())

    def pids(self) -> list[int]:
        """Of every worker of every attempt."""
        return [int(path.read_text()) for folder in self.attempts() for path in folder.glob("pid_*")]

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers and leaves none of them."""
    started: list[Launched] = []

    def start(plan: dict[str, list[object]], **options: object) -> Launched:
        started.append(Launched(tmp_path / "run", plan, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("code", [0, 65, 70, 75])
def test_the_workers_code_is_the_launchers(launch: Callable[..., Launched], code: int) -> None:
    started = launch({"all": ["leave", code]})
    assert started.finish()[0] == code
    events = [json.loads(line) for line in (started.folder / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("code"), e.get("returncodes")) for e in events] == [
        ("start", None, None),
        ("end", code, [0, 0]),
    ]


def test_workers_that_leave_no_code_have_failed(launch: Callable[..., Launched]) -> None:
    assert launch({"all": ["leave", None]}).finish()[0] == 1


def test_a_refusal_before_the_run_keeps_its_code_and_stays_one_line(launch: Callable[..., Launched]) -> None:
    code, _, err = launch({"0": ["exit", 2], "all": ["ignore", 0]}).finish()
    assert code == 2
    assert "died" not in err


def test_done_is_not_believed_when_a_worker_failed(launch: Callable[..., Launched]) -> None:
    assert launch({"0": ["leave", 0], "all": ["kill", int(signal.SIGKILL)]}).finish()[0] == 1


def test_rank_0_speaks_here_and_all_ranks_have_logs(launch: Callable[..., Launched]) -> None:
    started = launch({"all": ["leave", 0]})
    _, out, err = started.finish()
    assert (out, err) == ("rank 0 speaks\n", "rank 0 complains\n")
    for rank in (0, 1):
        lines = (started.folder / f"rank_0000{rank}.log").read_text().splitlines()
        assert sorted(lines) == [f"rank {rank} complains", f"rank {rank} speaks"]


def test_workers_find_their_place_and_a_file_to_meet_at(
    launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "left over")
    started = launch({"all": ["environment", 0]})
    assert started.finish()[0] == 0
    for rank in (0, 1):
        found = json.loads((started.folder / f"environment_{rank}").read_text())
        shared = [int(found.pop(name)) for name in ("SFT_HEARTBEATS", "SFT_STACKS")]  # descriptors
        assert min(shared) > 2
        assert len(found.pop("SFT_LEASE")) == 32  # the token that fences them
        assert found == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "SFT_RENDEZVOUS": f"file://{started.folder / 'rendezvous'}",
            "SFT_ATTEMPT": "1",
            "SFT_EXIT_CODE_FILE": str(started.folder / "exit_code"),
            "SFT_RUN_LOCKED": "1",
        }


@pytest.mark.parametrize(
    ("verb", "value", "cause"), [("kill", int(signal.SIGKILL), "of SIGKILL"), ("exit", 9, "with code 9")]
)
def test_a_dying_rank_ends_the_others_and_shows_its_log(
    launch: Callable[..., Launched], verb: str, value: int, cause: str
) -> None:
    started = launch({"1": [verb, value], "all": ["ignore", 0]})  # rank 0 does not even react to SIGTERM
    code, _, err = started.finish()
    assert code == 1
    log = started.folder / "rank_00001.log"
    assert f"rank 1 of 2 died {cause} and the others were ended; see {log}\n" in err
    assert "  | rank 1 complains" in err
    assert all(is_gone(int((started.folder / f"pid_{rank}").read_text())) for rank in (0, 1))


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")],
)
def test_stop_signals_reach_every_worker_once(launch: Callable[..., Launched], sent: str, received: str) -> None:
    started = launch({"all": ["stop", 75]})
    started.wait_ready()
    started.process.send_signal(signal.Signals[sent])
    assert started.finish()[0] == 75
    assert [(started.folder / f"stopped_{rank}").read_text() for rank in (0, 1)] == [received, received]


def test_the_second_interrupt_ends_workers_that_do_not_react(launch: Callable[..., Launched]) -> None:
    started = launch({"all": ["ignore", 0]})
    started.wait_ready()
    started.process.send_signal(signal.SIGINT)
    assert started.process.stderr is not None
    while "Ctrl-C again ends it at once" not in started.process.stderr.readline():
        assert started.process.poll() is None
    time.sleep(1.1 * TWICE_SECONDS)
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.finish()
    assert code == 1 and err.splitlines()[-1] == "sft-dist: ended by the second Ctrl-C"
    assert all(is_gone(pid) for pid in started.pids()) and len(started.attempts()) == 1


class Pretended:
    """Workers that keep what is done to them; `end_hang` is told what has been said before it waits for them."""

    def __init__(self, before_waiting: Callable[[], object] = lambda: None) -> None:
        self.done: list[str] = []
        self.are_running, self.returncodes, self._before_waiting = True, [-9], before_waiting

    def send(self, number: signal.Signals) -> None:
        self.done.append(number.name)

    def kill(self) -> None:
        self.done.append("kill")

    def beats(self) -> dict[int, Beat]:
        return {0: Beat(4, "train", 1.0, 1)}

    def stacks(self, seconds: float) -> dict[int, str]:
        return {0: ""}

    def records(self, seconds: float) -> list[Path]:
        return []

    def wait(self) -> None:
        self._before_waiting()
        self.are_running = False


@pytest.mark.parametrize(
    ("sent", "done"),
    [
        ([(0, "SIGINT"), (0.1, "SIGINT")], ["SIGINT"]),  # a forwarder that sends twice
        ([(0, "SIGINT"), (0.1, "SIGINT"), (2, "SIGINT")], ["SIGINT", "kill"]),
        ([(0, "SIGINT"), (1, "SIGTERM"), (2, "SIGINT")], ["SIGINT", "SIGTERM", "kill"]),
        ([(0, "SIGTERM"), (1, "SIGINT"), (2, "SIGTERM")], ["SIGTERM", "SIGINT", "SIGTERM"]),
    ],
)
def test_interrupts_are_counted(
    monkeypatch: pytest.MonkeyPatch, sent: list[tuple[float, str]], done: list[str]
) -> None:
    stops, workers = Stops(), Pretended()
    stops.pass_to(workers)  # type: ignore[arg-type]
    for at, name in sent:
        monkeypatch.setattr(time, "monotonic", lambda at=at: 100.0 + at)
        stops._on_signal(signal.Signals[name], None)
    assert workers.done == done and stops.has_killed == ("kill" in done)


def test_a_hang_is_told_before_its_workers_are_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank that is stuck in the kernel outlives SIGKILL."""
    job = Job(("true",), 1, tmp_path, 1)
    job.attempt_dir.mkdir(parents=True)
    said: list[str] = []
    workers = Pretended(lambda: said.append(capsys.readouterr().err))
    assert end_hang(job, workers, Hearing(job), 7.0).code == 71  # type: ignore[arg-type]
    assert workers.done == ["kill"]
    assert len(said) == 1 and "hang: no sign of life for 7 s; rank 0: step 4, train" in said[0]


def test_stacks_are_written_before_anybody_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for other nodes, nor for NCCL's record on a disk that does not answer."""
    monkeypatch.setattr("sft_dist.launch.local.RECORDS_SECONDS", 0.1)
    job, steps = Job(("true",), 1, tmp_path, 1), []
    job.attempt_dir.mkdir(parents=True)
    workers = Pretended()
    monkeypatch.setattr(workers, "records", lambda seconds: threading.Event().wait())

    class Heard(Hearing):
        def call(self) -> None:
            steps.append("called")
            super().call()

        def hear(self, *given: Any) -> Any:
            wait_for(lambda: job.stacks_path(0).exists() and "no answer" in job.stacks_path(0).read_text())
            steps.append("heard")
            return super().hear(*given)

    monkeypatch.setattr(workers, "stacks", lambda seconds: (steps.append("asked"), {0: ""})[1])
    assert end_hang(job, workers, Heard(job), 7.0).code == 71  # type: ignore[arg-type]
    assert steps == ["called", "asked", "heard"] and workers.done == ["kill"]
    assert "NCCL" not in capsys.readouterr().err


def test_sigkill_of_the_launcher_leaves_no_orphan_and_a_free_folder(launch: Callable[..., Launched]) -> None:
    started = launch({"all": ["ignore", 0]})
    workers = started.wait_ready()
    for pid in workers:  # the folder stays taken until the last of them is gone
        opened = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        assert str(started.run_dir / "lock") in opened
    started.process.send_signal(signal.SIGKILL)
    started.process.wait()
    RunLock.acquire(started.run_dir, wait_seconds=2).release()
    assert all(is_gone(pid) for pid in workers)


def test_a_second_launcher_is_refused_naming_the_first(launch: Callable[..., Launched]) -> None:
    first = launch({"all": ["stop", 75]})
    first.wait_ready()
    code, _, err = launch({"all": ["leave", 0]}, wait=0.2).finish()
    assert code == 73
    assert f"held by process {first.process.pid} on " in err
    first.process.send_signal(signal.SIGTERM)
    assert first.finish()[0] == 75


def test_launching_in_this_process_gives_its_signal_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    job = Job((sys.executable, "-c", "raise SystemExit(0)"), 1, tmp_path, 1)
    job.attempt_dir.mkdir(parents=True)
    with Stops() as stops:
        assert supervise(job, stops).code == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_on_a_terminal_rank_0_sees_a_terminal_of_the_same_size(tmp_path: Path) -> None:
    import pty
    import termios

    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (33, 111))
    program = (
        "import pathlib, sys\n"
        "from sft_dist.launch.job import Job\n"
        "from sft_dist.launch.local import supervise\n"
        "from sft_dist.launch.stops import Stops\n"
        "code = 'import os, sys; print(sys.stdout.isatty(), tuple(os.get_terminal_size(1)))'\n"
        "job = Job((sys.executable, '-c', code), 1, pathlib.Path(sys.argv[1]), 1)\n"
        "job.attempt_dir.mkdir(parents=True)\n"
        "supervise(job, Stops())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=inner, stderr=inner, check=True)
    os.close(inner)
    assert os.read(outer, 1000).decode().strip() == "True (111, 33)"
    assert (attempt_dir(tmp_path, 1) / "rank_00000.log").read_text() == "True (111, 33)\n"


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    code = "import time\nfor n in range(200): print('x' * 1000, flush=True)\n"
    program = (
        "import pathlib, sys\n"
        "from sft_dist.launch.job import Job\n"
        "from sft_dist.launch.local import supervise\n"
        "from sft_dist.launch.stops import Stops\n"
        f"job = Job((sys.executable, '-c', {code!r}), 1, pathlib.Path(sys.argv[1]), 1)\n"
        "job.attempt_dir.mkdir(parents=True)\n"
        "supervise(job, Stops())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=20)
    assert (attempt_dir(tmp_path, 1) / "rank_00000.log").stat().st_size == 200 * 1001


@pytest.mark.parametrize(
    ("verb", "odd", "frame"),
    [
        ("stopped", "odd one out is rank 1: step 10, train, gave no stack", None),
        ("sleep", "odd one out is rank 1: step 10, data, at <string>:", "<module>"),
        ("other collective", "odd one out is rank 1: step 10, train, at <string>:", "wait_in_another_collective"),
        ("holds the interpreter", "odd one out is rank 1: step 10, train, at <string>:", "<module>"),
    ],
)
def test_a_hang_is_found_shown_and_ended(
    launch: Callable[..., Launched], verb: str, odd: str, frame: str | None
) -> None:
    started = launch({"1": [verb, 0], "all": ["collective", 0]}, num=3, hang_seconds=1)
    pids = started.wait_ready()
    since = time.monotonic()
    code, _, err = started.finish()
    assert code == 71
    assert time.monotonic() - since < 1 + 5 + 10
    assert odd in err
    assert "ranks 0, 2: step 10, train, at <string>:" in err and "in wait_in_a_collective" in err
    stacks = [(started.folder / f"rank_0000{rank}.stacks.txt").read_text() for rank in range(3)]
    assert all("in wait_in_a_collective" in stacks[rank] for rank in (0, 2))
    assert (frame or "no answer: the process was stopped") in stacks[1]
    assert (started.folder / "exit_code").read_text() == "71\n"
    assert all(is_gone(pid) for pid in pids)


def test_nccls_record_is_asked_for_and_its_place_told(launch: Callable[..., Launched]) -> None:
    started = launch({"all": ["collective of nccl", 0]}, hang_seconds=1)
    code, _, err = started.finish()
    assert code == 71 and f"NCCL's last collectives in {started.folder}/nccl_rank_*" in err, err
    assert [(started.folder / f"nccl_rank_{rank}").read_text() for rank in (0, 1)] == ["record", "record"]
    assert not any(Path((started.folder / f"pipe_{rank}").read_text()).exists() for rank in (0, 1))


def test_a_hang_is_started_again_in_an_attempt_of_its_own(launch: Callable[..., Launched]) -> None:
    started = launch(
        {"1/1": ["stopped", 0], "1/0": ["collective", 0], "all": ["leave", 0]}, hang_seconds=1, max_restarts=3
    )
    code, _, err = started.finish()
    assert code == 0
    assert "attempt 1 ended (hang): going on after step 0, restart 1 of 3" in err
    first, second = started.attempts()
    assert [(folder / "exit_code").read_text().strip() for folder in (first, second)] == ["71", "0"]
    events = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["restart", "start", "end"]
    assert (second / "command.txt").read_text() == (first / "command.txt").read_text()
    assert all(is_gone(pid) for pid in started.pids())
    RunLock.acquire(started.run_dir, wait_seconds=0).release()


def test_the_folder_stays_locked_over_a_restart(launch: Callable[..., Launched]) -> None:
    started = launch({"1/1": ["kill", int(signal.SIGKILL)], "1/0": ["ignore", 0], "all": ["stop", 75]}, max_restarts=1)
    wait_for(lambda: (attempt_dir(started.run_dir, 2) / "ready_1").exists())
    with pytest.raises(LockedError, match=f"held by process {started.process.pid} on "):
        RunLock.acquire(started.run_dir, wait_seconds=0)
    wait_for(lambda: (attempt_dir(started.run_dir, 2) / "ready_0").exists())
    started.process.send_signal(signal.SIGTERM)
    assert started.finish()[0] == 75


def test_sigkill_of_the_launcher_after_a_restart_leaves_no_orphan(launch: Callable[..., Launched]) -> None:
    started = launch({"1/1": ["kill", int(signal.SIGKILL)], "all": ["ignore", 0]}, max_restarts=1)
    wait_for(lambda: all((attempt_dir(started.run_dir, 2) / f"ready_{rank}").exists() for rank in (0, 1)))
    started.process.send_signal(signal.SIGKILL)
    started.process.wait()
    RunLock.acquire(started.run_dir, wait_seconds=2).release()
    assert all(is_gone(pid) for pid in started.pids())


def test_three_restarts_without_a_new_checkpoint_are_enough(launch: Callable[..., Launched]) -> None:
    started = launch({"1": ["kill", int(signal.SIGSEGV)], "all": ["ignore", 0]}, max_restarts=9)
    code, _, err = started.finish()
    assert code == 76
    assert "no new checkpoint in 3 restarts" in err
    assert len(started.attempts()) == 4
    assert all(is_gone(pid) for pid in started.pids())


def test_a_new_checkpoint_is_progress_and_max_restarts_the_end(launch: Callable[..., Launched]) -> None:
    plan = {f"{attempt}/0": ["save", attempt] for attempt in range(1, 6)}
    started = launch({**plan, "all": ["ignore", 0]}, max_restarts=4)
    code, _, err = started.finish()
    assert code == 1
    assert "resilience.max_restarts=4 reached" in err
    assert len(started.attempts()) == 5


@pytest.mark.parametrize("code", [1, 2, 65, 70, 73, 75])
def test_what_would_only_fail_again_is_not_started_again(launch: Callable[..., Launched], code: int) -> None:
    started = launch({"0": ["exit", code], "all": ["ignore", 0]}, max_restarts=3)
    assert started.finish()[0] == code
    assert len(started.attempts()) == 1


def test_a_peer_that_fails_first_does_not_hide_who_was_killed(launch: Callable[..., Launched]) -> None:
    started = launch({"1/0": ["exit", 1], "1/1": ["die later", 0.3], "all": ["leave", 0]}, max_restarts=3)
    code, _, err = started.finish()
    assert code == 0
    assert "attempt 1 ended (rank 1 died of SIGKILL)" in err


def test_a_storage_failure_is_started_again(launch: Callable[..., Launched]) -> None:
    started = launch({"1/0": ["exit", 74], "1/1": ["ignore", 0], "all": ["leave", 0]}, max_restarts=3)
    assert started.finish()[0] == 0
    assert len(started.attempts()) == 2


@pytest.mark.parametrize("by", ["signal", "file"])
def test_who_asked_for_a_stop_gets_no_restart(launch: Callable[..., Launched], by: str) -> None:
    started = launch({"all": ["ignore", 0]}, max_restarts=3)
    pids = started.wait_ready()
    if by == "signal":
        started.process.send_signal(signal.SIGTERM)
    else:
        (started.run_dir / "stop").touch()
    time.sleep(0.2)
    os.kill(pids[1], signal.SIGKILL)
    assert started.finish()[0] == 1
    assert len(started.attempts()) == 1


def test_a_restart_of_a_run_that_began_anew_goes_on_with_it(launch: Callable[..., Launched]) -> None:
    started = launch(
        {"1/1": ["begin anew", 0], "2/1": ["kill", 9], "all": ["ignore", 0]}, max_restarts=2, resume="never"
    )
    wait_for(lambda: (attempt_dir(started.run_dir, 3) / "config.yaml").exists())
    resumes = [("resume: auto" in (folder / "config.yaml").read_text()) for folder in started.attempts()]
    assert resumes == [False, True, True]


def test_process_count_is_given_or_one_per_visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.launch.job._present_gpus", lambda: 8)
    assert count_gpus({}) == 8
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "GPU-aa, GPU-bb ,GPU-cc"}) == 3
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,2"}) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert choose_num_processes(None, {"CUDA_VISIBLE_DEVICES": ""}) == 1
    assert choose_num_processes(3, {}) == 3
    with pytest.raises(ConfigError, match="--nproc 0"):
        choose_num_processes(0)


def test_the_launcher_imports_no_torch() -> None:
    program = "import sys, sft_dist.launch.local; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
