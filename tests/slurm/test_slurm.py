"""Runs on a real Slurm: whatever the scheduler does to a job, its losses and weights are those of the straight run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.submitted import NUM_STEPS, Submitted, files_with, secret_of, workers
from tiny_run import lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Prepare = Callable[..., Submitted]


def endings(run: Submitted) -> list[dict[str, object]]:
    """What train.sbatch noted of each start that it saw the end of."""
    return [json.loads(line) for line in (run.run_dir / "slurm" / "endings.jsonl").read_text().splitlines()]


def test_every_interruption_ends_in_the_same_weights(
    cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted
) -> None:
    """One job, interrupted in every way that Slurm has and by a crash, each time after further steps."""
    run = prepare_run("interrupted")
    job = run.submit()

    run.wait_for_step(2)
    secrets = {secret_of(cluster, nodes_of(cluster, job))}
    run.wait_for_step(4)  # the signal that Slurm sends before the time limit; scancel saves the minute
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 60, run.log())
    first = endings(run)[0]
    assert (first["code"], first["near_end"], first["again"]) == (75, True, True)

    hurry(cluster, job)
    run.wait_for_steps_of(attempt=2, number=1)
    secrets.add(secret_of(cluster, nodes_of(cluster, job)))
    run.wait_for_steps_of(attempt=2, number=3)
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", 60, run.log())

    hurry(cluster, job)
    run.wait_for_steps_of(attempt=3, number=3)
    victim = cluster.nodes[1]
    cluster.run("scontrol", "update", f"NodeName={victim}", "State=DRAIN", "Reason=test")
    cluster.run("scontrol", "update", f"NodeName={victim}", "State=DOWN", "Reason=test")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "3", 60, run.log())
    hurry(cluster, job)
    run.wait_for_steps_of(attempt=4, number=3)
    assert victim not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()
    cluster.run("scontrol", "update", f"NodeName={victim}", "State=RESUME")

    (worker,) = workers(cluster, cluster.job(job)["BatchHost"])
    cluster.run("kill", "-9", worker)  # rank 0; nothing but the script requeues after a crash
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "4", 60, run.log())
    hurry(cluster, job)
    run.wait_for_steps_of(attempt=5, number=1)

    preempt = ("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    urgent = cluster.run(*preempt).stdout.strip()
    assert run.wait()["JobState"] == "COMPLETED", run.log()
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "5" and run.attempts == 6
    assert [(e["code"], e["again"]) for e in endings(run) if not e["ended"]] == [(75, True), (1, True), (0, False)]
    assert run.result == uninterrupted.result
    assert len(secrets) == 2 and not any(files_with(run.run_dir, secret) for secret in secrets)


@pytest.mark.faults
def test_a_hang_on_one_node_ends_both_and_the_job_goes_on(
    cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted
) -> None:
    run = prepare_run("hang", resilience={"hang_seconds": 8.0})
    job = run.submit()
    run.wait_for_step(12)
    (worker,) = workers(cluster, other_node(cluster, job))
    cluster.run("kill", "-STOP", worker)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 90, run.log())
    assert "odd one out is rank 1: " in run.log() and "rank 0: " in run.log()
    assert run.wait()["JobState"] == "COMPLETED", run.log()
    assert [(e["code"], e["again"]) for e in endings(run)] == [(71, True), (0, False)]
    assert run.result == uninterrupted.result


@pytest.mark.faults  # Slurm needs SlurmdTimeout to notice
def test_a_node_that_loses_power_is_replaced(cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted) -> None:
    run = prepare_run("power")
    job = run.submit()
    run.wait_for_step(12)
    victim = other_node(cluster, job)
    cluster.power_off(victim)
    try:
        cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 120, run.log())
        assert run.wait()["JobState"] == "COMPLETED", run.log()
        nodes = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()
        assert len(nodes) == 2 and victim not in nodes
        assert run.result == uninterrupted.result
    finally:
        cluster.power_on(victim)
        cluster.wait(lambda: "idle" in cluster.run("sinfo", "-hN", "-n", victim, "-o%T").stdout, 30, "power is back")


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    """The nodes of a job that runs."""
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()


def other_node(cluster: Cluster, job: str) -> str:
    """The second node of a job on two."""
    return next(name for name in nodes_of(cluster, job) if name != cluster.job(job)["BatchHost"])


def hurry(cluster: Cluster, job: str) -> None:
    """A requeued job waits some seconds; go on at once."""
    cluster.wait_job(job, 60, {"RUNNING"})


def test_a_cancelled_job_saves_stays_cancelled_and_goes_on_in_a_chain(
    cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted
) -> None:
    """Cancelled, then submitted again as a chain of three for a site without requeueing, of which two are needed."""
    run = prepare_run("cancelled")
    job = run.submit()
    run.wait_for_step(5)
    run.sft("slurm", "cancel", run.run_dir)
    assert run.wait(job)["JobState"] == "CANCELLED"
    steps = len(lines(run.run_dir, "step"))
    assert 5 <= steps < NUM_STEPS and (run.run_dir / "checkpoints" / f"step-{steps:08d}").is_dir(), run.log()

    run.submit("cluster.chain=3", "cluster.requeue=false")
    first, second, third = run.jobs[1:]
    run.wait_for_step(steps + 5)
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    assert run.wait(third)["JobState"] == "COMPLETED", run.log()
    assert cluster.job(first)["ExitCode"] == "75:0" and cluster.job(second)["JobState"] == "COMPLETED"
    assert cluster.job(job)["JobState"] == "CANCELLED" and run.attempts == 3
    assert run.result == uninterrupted.result


def test_an_array_is_one_run_for_each_seed(prepare_run: Prepare) -> None:
    run = prepare_run("array", cluster={"array": [7, 8], "nodes": 1}, optim={"lr": 1e-3, "max_steps": 4})
    job = run.submit()
    assert [run.wait(f"{job}_{task}")["JobState"] for task in (0, 1)] == ["COMPLETED"] * 2, run.log()
    first, second = ([line["loss"] for line in lines(run.run_dir / f"seed-{seed}", "step")] for seed in (7, 8))
    assert len(first) == len(second) == 4 and first != second


def test_hostile_names_stay_words(prepare_run: Prepare, tmp_path: Path) -> None:
    """A run folder, a variable and a data file whose names a shell, Slurm or YAML would read as something else."""
    folder = 'it\'s; touch pwned & $(touch pwned) `touch pwned` %j %A "x" JobState=COMPLETED *'
    hostile = "$(touch pwned); 'a' \"b\" \\ #"
    run = prepare_run(
        "hostile",
        run={"name": "x.-_y", "dir": folder},
        cluster={
            "nodes": 1,
            "environment": {"HOSTILE": hostile},
            "setup": [f"[[ $HOSTILE == {shlex.quote(hostile)} ]]"],
        },
        optim={"lr": 1e-3, "max_steps": 3},
    )
    job = run.submit("data.sources.0.path=./data.json")
    assert run.wait(job)["JobState"] == "COMPLETED", run.log()
    assert len(lines(run.run_dir, "step")) == 3 and (run.run_dir / "slurm" / f"{job}.out").is_file()
    assert not list(run.recipe.parent.rglob("pwned")) and not (run.cluster.folder / "pwned").exists()
    status = json.loads(run.sft("slurm", "status", run.run_dir, "--json").stdout)
    assert status["jobs"][0]["state"] == "COMPLETED" and status["step"] == 3
