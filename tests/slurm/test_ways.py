"""Ways onto a cluster, and what an operator can ask: each gives the losses and weights of the plain two-node job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster
from slurm.submitted import NUM_STEPS, ONE_CORE, Submitted
from tiny_run import ROOT, environment, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Prepare = Callable[..., Submitted]


SHORT = 8  # steps of a run that only has to begin as the others do


def by_srun(run: Submitted) -> None:
    train = f"{ONE_CORE}; exec {sys.executable} -m sft_dist train {run.recipe}"
    command = ("srun", "-N2", "--ntasks-per-node=1", "bash", "-c", train)
    search = f"{ROOT}:{ROOT / 'kernels'}"
    run.cluster.run(*command, cwd=run.recipe.parent, PYTHONPATH=search, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")


def by_torchrun(run: Submitted) -> None:
    ends_with_75(run, run.submit("cluster.launcher=torchrun"))


def by_accelerate(run: Submitted) -> None:
    ends_with_75(run, run.submit("cluster.launcher=accelerate"))


def ends_with_75(run: Submitted, job: str) -> None:
    assert run.wait(job)["ExitCode"] == "75:0", run.log()


def on_a_laptop(run: Submitted) -> None:
    command = [sys.executable, "-m", "sft_dist", "train", str(run.recipe), "cluster.target=local", "--nproc", "2"]
    done = subprocess.run(
        command, env=environment(), cwd=run.recipe.parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 75, done.stdout + done.stderr


@pytest.mark.parametrize("way", [by_srun, by_torchrun, by_accelerate, on_a_laptop], ids=lambda way: way.__name__)
def test_every_way_takes_the_same_steps(
    prepare_run: Prepare, uninterrupted: Submitted, way: Callable[[Submitted], None]
) -> None:
    """As our own launcher in a job of two nodes; tests/distributed/test_entries.py has the ways on one machine."""
    run = prepare_run(way.__name__, optim={"stop_after_step": SHORT})
    way(run)
    taken = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run.run_dir, "step")]
    assert len(taken) == SHORT and taken == uninterrupted.result[0][:SHORT]


@pytest.mark.faults
def test_a_node_with_other_code_is_left_out(
    cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "sft_dist", other / "sft_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "sft_dist" / "errors.py").open("a").write("# edited on one node only\n")
    victim = cluster.nodes[1]
    line = f'[ "$SLURMD_NODENAME" != {victim} ] || export PYTHONPATH={other}:{ROOT / "kernels"}'
    run = prepare_run("preflight", cluster={"preflight": True, "setup": [ONE_CORE, line]})
    job = run.submit()
    assert run.wait()["JobState"] == "COMPLETED", run.log()
    record = cluster.job(job)
    assert (record["Restarts"], record["ExcNodeList"]) == ("1", victim)
    said = run.sft("slurm", "logs", run.run_dir).stdout
    assert f"preflight: node {victim}: sft_dist is" in said and ", 0 complaints, all-reduce" in said
    assert run.result == uninterrupted.result


@pytest.mark.faults
def test_torchrun_inside_the_job_is_stopped_and_goes_on(
    cluster: Cluster, prepare_run: Prepare, uninterrupted: Submitted
) -> None:
    """torchrun knows neither our signals nor our codes; worker.sh and the files do. An operator looks meanwhile."""
    run = prepare_run("torchrun", cluster={"launcher": "torchrun"})
    job = run.submit()
    run.wait_for_step(4)
    status = json.loads(run.sft("slurm", "status", run.run_dir, "--json").stdout)
    assert status["jobs"][0]["state"] == "RUNNING" and status["step"] >= 4
    assert [place["rank"] for place in status["ranks"]] == [0, 1]
    assert {place["host"] for place in status["ranks"]} == set(cluster.nodes[:2])
    assert all(place["where"].startswith("step ") and ", at " in place["where"] for place in status["ranks"]), status
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert run.wait(job)["JobState"] == "COMPLETED", run.log()
    assert cluster.job(job)["Restarts"] == "1" and run.result == uninterrupted.result
    assert "goes on after the time limit" in run.sft("slurm", "logs", run.run_dir).stdout


@pytest.mark.faults
def test_data_are_prepared_by_a_job_of_its_own(prepare_run: Prepare) -> None:
    run = prepare_run("prepared", data={"cache_dir": "own-cache"}, optim={"lr": 1e-3, "max_steps": 2})
    first = run.sft("submit", run.recipe, "--job", "prepare").stdout.strip()
    second = run.submit(f"cluster.dependency=afterok:{first}")
    assert run.wait(second)["JobState"] == "COMPLETED", run.log()
    assert run.cluster.job(first)["NumNodes"] == "1" and "store: " in run.log()
    assert len(lines(run.run_dir, "step")) == 2 < NUM_STEPS


def test_what_slurm_refuses_is_one_line(prepare_run: Prepare) -> None:
    run = prepare_run("refused", cluster={"partition": "nowhere"})
    refused = run.sft("submit", run.recipe, code=2)
    assert refused.stderr.startswith("sft-dist: error: sbatch: ") and "Invalid partition" in refused.stderr
    line = run.sft("submit", run.recipe, "--dry-run").stdout
    assert line.startswith("sbatch ") and "--partition=nowhere" in line and not (run.run_dir / "logs").exists()
