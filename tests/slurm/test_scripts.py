"""slurm/*.sbatch on a real Slurm, each ending of a run played by a shell script in Python's place: seconds, no torch.

What is proven here is the batch side: who requeues, with which code a job leaves, which nodes it is given next. That a
real run goes on with the same bits is test_slurm.py's.
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from tiny_run import ROOT

from sft_dist.cli.submit import note_job
from sft_dist.config.loader import load_recipe
from sft_dist.launch.submission import sbatch_command, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
WAIT = 'for _ in $(seq 200); do [ ! -e "$SFT_STOP_FILE" ] || exit $((SFT_NODE_RANK ? 0 : 75)); sleep 0.1; done; exit 0'


ONE_NODE_KNOWS = "[ $SFT_NODE_RANK = 0 ] && exec env --default-signal=TERM sleep 60; exit 65"


class Played:
    """A job whose runs are the shell lines `body`; $RESTART is 0 at the first start."""

    def __init__(self, cluster: Cluster, folder: Path, body: str, settings: tuple[str, ...]) -> None:
        self.cluster, self.run_dir, self.up = cluster, folder / "run", folder / "up"
        program = folder / "python"
        program.write_text(f"#!/bin/bash\nRESTART=${{SLURM_RESTART_COUNT:-0}}\ntouch {self.up}.$RESTART\n{body}\n")
        program.chmod(0o755)
        given = ["model.path=gpt2", "data.sources=[{path: x.json}]", f"run.dir={self.run_dir}", "cluster.target=slurm"]
        given += ["cluster.time=10", "cluster.preflight=false", "cluster.processes_per_node=1", "cluster.nodes=2"]
        recipe = load_recipe([], [*given, *settings])
        write_files(recipe, "one")
        for path in self.run_dir.rglob("job.env"):
            text = path.read_text().replace(f"SFT_PYTHON={sys.executable}\n", f"SFT_PYTHON={program}\n")
            path.write_text(text)
        search = f"{ROOT}:{ROOT / 'kernels'}"
        self.job = cluster.run(*sbatch_command(recipe), cwd=folder, PYTHONPATH=search).stdout.strip()
        note_job(recipe, self.job, "one")

    def sft(self, *words: str, of: str = ".") -> str:
        """What `sft-dist slurm WORDS RUN_DIR` (or a folder in it) prints on the login node."""
        command = (sys.executable, "-m", "sft_dist", "slurm", *words, self.run_dir / of)
        return self.cluster.run(*command, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}").stdout

    def started(self, restart: int = 0) -> None:
        """Until the workers of this start run."""
        self.cluster.wait(Path(f"{self.up}.{restart}").exists, 30, f"start {restart}: {self.log()}")

    def end(self, job: str = "") -> tuple[str, str, str]:
        """(state, restarts, exit code) once the job is over."""
        record = self.cluster.wait_job(job or self.job, 60)
        return record["JobState"], record["Restarts"], record["ExitCode"].partition(":")[0]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in (self.run_dir / "slurm").glob("*.out"))

    def endings(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run_dir / "slurm" / "endings.jsonl").read_text().splitlines()]


@pytest.fixture
def play(cluster: Cluster, tmp_path: Path) -> Callable[..., Played]:
    """`play("exit 70", "cluster.nodes=1")`: submitted."""
    count = itertools.count()

    def submit(body: str, *settings: str) -> Played:
        folder = tmp_path / str(next(count))
        folder.mkdir()
        return Played(cluster, folder, textwrap.dedent(body), settings)

    return submit


def test_near_the_time_limit_it_requeues_itself(cluster: Cluster, play: Callable[..., Played]) -> None:
    job = play(f"[ $RESTART = 0 ] || exit 0\n{WAIT}")
    job.started()
    cluster.run("scancel", "--signal=USR1", "--batch", job.job)
    assert job.end() == ("COMPLETED", "1", "0"), job.log()
    assert [(e["code"], e["near_end"], e["again"]) for e in job.endings()] == [(75, True, True), (0, False, False)]


def test_a_cancelled_job_stays_cancelled_even_after_the_warning(cluster: Cluster, play: Callable[..., Played]) -> None:
    job = play("trap '' TERM\nfor _ in $(seq 30); do sleep 0.1; done; exit $((SFT_NODE_RANK ? 0 : 75))")
    job.started()
    cluster.run("scancel", "--signal=USR1", "--batch", job.job)
    cluster.run("scancel", job.job)
    assert job.end()[:2] == ("CANCELLED", "0"), job.log()
    cluster.wait(
        lambda: not cluster.run("squeue", "-hj", job.job, check=False).stdout.strip(), 30, "all its processes gone"
    )
    assert cluster.job(job.job)["JobState"] == "CANCELLED" and [(e["ended"], e["again"]) for e in job.endings()] == [
        (True, False)
    ]


def test_what_slurm_requeues_is_not_requeued_twice(cluster: Cluster, play: Callable[..., Played]) -> None:
    job = play(f"[ $RESTART = 0 ] || exit 0\n{WAIT}")
    job.started()
    cluster.run("scontrol", "requeue", job.job)
    assert job.end() == ("COMPLETED", "1", "0"), job.log()
    assert [(e["code"], e["ended"], e["again"]) for e in job.endings()] == [(75, True, False), (0, False, False)]


ENDINGS = {
    "nan": ("exit $((SFT_NODE_RANK ? 0 : 70))", [], ("FAILED", "0", "70")),
    "stop": ("exit $((SFT_NODE_RANK ? 0 : 75))", [], ("FAILED", "0", "75")),  # RUN_DIR/stop: somebody wants it so
    "second node": (ONE_NODE_KNOWS, [], ("FAILED", "0", "65")),
    "twice": ("exit 71", ["resilience.max_restarts=1"], ("FAILED", "1", "71")),
    "crash": ("[ $RESTART = 1 ] && exit 0; kill -9 $$", [], ("COMPLETED", "1", "0")),
    "setup": ("exit 0", ['cluster.setup=["false"]'], ("FAILED", "0", "2")),
    "no requeue": ("exit 71", ["cluster.requeue=false"], ("FAILED", "0", "71")),
    "fruitless": (
        "exit $((SFT_NODE_RANK ? 0 : 71))",
        ["resilience.max_restarts=9", "cluster.nodes=1"],
        ("FAILED", "2", "76"),
    ),
}


def test_other_endings(play: Callable[..., Played]) -> None:
    """Of jobs that share the nodes and run at the same time."""
    jobs = {name: play(body, "cluster.exclusive=false", *given) for name, (body, given, _) in ENDINGS.items()}
    found = {name: job.end() for name, job in jobs.items()}
    assert found == {name: end for name, (*_, end) in ENDINGS.items()}, "\n".join(job.log() for job in jobs.values())
    assert "no new checkpoint in 3 starts" in jobs["fruitless"].log()


def test_a_bad_node_is_left_out(cluster: Cluster, play: Callable[..., Played], tmp_path: Path) -> None:
    """As the preflight does it: its name in the launch's folder, and 77."""
    meeting = tmp_path / "0" / "run" / "logs" / "preflight-$SFT_MEETING"
    job = play(f"""
        [ $RESTART = 0 ] || exit 0
        [ $SFT_NODE_RANK = 0 ] || exec env --default-signal=TERM sleep 60
        mkdir -p {meeting}
        set -- $SFT_NODE_NAMES
        echo $2 >{meeting}/bad_nodes
        exit 77
    """)
    assert job.end() == ("COMPLETED", "1", "0"), job.log()
    bad = str(job.endings()[0]["bad_nodes"][0])  # type: ignore[index]
    record = cluster.job(job.job)
    assert record["ExcNodeList"] == bad and bad in cluster.nodes
    assert bad not in cluster.run("scontrol", "show", "hostnames", record["NodeList"]).stdout.split()


def test_an_arrays_member_requeues_alone(cluster: Cluster, play: Callable[..., Played], tmp_path: Path) -> None:
    """By the warning before the time limit, and by an operator; the other member runs on."""
    done = tmp_path / "done"
    wait = WAIT.replace("200", "600").replace("sleep", f"[ ! -e {done} ] || exit 0; sleep")
    job = play(wait, "cluster.array=[7,8]", "cluster.nodes=1")
    job.started()
    cluster.wait_job(f"{job.job}_0", 30, {"RUNNING"})
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job.job}_1")  # the last one's own id is the array's
    cluster.wait(lambda: cluster.job(f"{job.job}_1")["Restarts"] == "1", 30, job.log())
    cluster.wait_job(f"{job.job}_1", 30, {"RUNNING"})
    assert job.sft("requeue", of="seed-8") == f"requeued {job.job}_1\n"

    told = json.loads(job.sft("status", "--json"))
    assert sorted(one["job"] for one in told["jobs"]) == [f"{job.job}_0", f"{job.job}_1"], told
    assert set(told["members"]) == {"seed-7", "seed-8"}
    (member,) = json.loads(job.sft("status", "--json", of="seed-7"))["jobs"]
    assert (member["job"], member["state"], member["restarts"]) == (f"{job.job}_0", "RUNNING", "0")

    done.touch()
    assert [job.end(f"{job.job}_{task}")[:2] for task in (0, 1)] == [("COMPLETED", "0"), ("COMPLETED", "2")], job.log()
    assert "restart 1]" in job.sft("logs", of="seed-8") and "restart 1]" not in job.sft("logs", of="seed-7")


def test_the_run_is_told_when_the_job_ends(play: Callable[..., Played]) -> None:
    """Ten minutes from its start, also by a Slurm that does not say so itself."""
    job = play("left=$((SLURM_JOB_END_TIME - $(date +%s))); [ $left -gt 540 ] && [ $left -le 600 ] || exit 65")
    assert job.end() == ("COMPLETED", "0", "0"), job.log()


RANK = """
import os, time
from pathlib import Path
from sft_dist.resilience.heartbeat import heart
from sft_dist.resilience.stacks import answer_with_stacks
def wait_for_the_stop():
    Path(os.environ["SFT_RESULT_FILE"]).with_name("beats." + os.environ["RANK"]).touch()
    while not Path(os.environ["SFT_STOP_FILE"]).exists():
        time.sleep(0.05)
answer_with_stacks()
heart().beat(7 - int(os.environ["RANK"]), "train")
wait_for_the_stop()
"""


def test_an_operator_sees_every_rank_requeues_and_cancels(
    cluster: Cluster, play: Callable[..., Played], tmp_path: Path
) -> None:
    """The ranks are processes that beat and can show their stacks, as real ones do, without the model."""
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    rank = f"RANK=$SFT_NODE_RANK LOCAL_RANK=0 {sys.executable} {program} sft_dist.train"
    job = play(f"{rank}; exit $((SFT_NODE_RANK ? 0 : 75))")
    beats = [job.run_dir / "slurm" / f"beats.{number}" for number in (0, 1)]
    cluster.wait(lambda: all(path.exists() for path in beats), 30, job.log())

    told = json.loads(job.sft("status", "--json"))
    assert (told["jobs"][0]["state"], told["jobs"][0]["job"]) == ("RUNNING", job.job)
    assert [(place["rank"], place["host"]) for place in told["ranks"]] == list(enumerate(cluster.nodes[:2]))
    assert ["step 7, train" in place["where"] for place in told["ranks"]] == [True, False]
    assert all("wait_for_the_stop" in place["where"] for place in told["ranks"]), told
    assert "behind: rank 1; the others wait for it" in job.sft("status")

    for path in beats:
        path.unlink()
    assert job.sft("requeue") == f"requeued {job.job}\n"
    cluster.wait_job(job.job, 60, {"PENDING"})
    cluster.wait_job(job.job, 60, {"RUNNING"})
    cluster.wait(lambda: all(path.exists() for path in beats), 30, job.log())
    assert job.sft("cancel") == f"cancelled {job.job}\n"
    assert job.end()[:2] == ("CANCELLED", "1") and job.sft("cancel") == "nothing is queued or running\n"
    assert "restart 1] SIGTERM: asked to end" in job.sft("logs")
