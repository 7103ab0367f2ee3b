"""One Slurm for all tests of this folder, and runs submitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster, proctrack, why_impossible
from slurm.submitted import CLUSTER, NUM_STEPS, TINY, Submitted
from tiny_run import write_recipe


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes; skipped, with the reason, where no Slurm can run."""
    reason = why_impossible()
    if reason:
        pytest.skip(f"no real Slurm on this machine: {reason}")
    with Cluster(3) as running:
        print(f"Slurm in {running.folder}, proctrack/{proctrack()}")
        yield running


@pytest.fixture(scope="session")
def prepare_run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Submitted]]:
    """`prepare_run("name", cluster={...})`: a recipe ready to be submitted. Jobs that are left are cancelled."""
    folder = tmp_path_factory.mktemp("project")
    prepared: list[Submitted] = []

    def make(name: str, **changes: dict[str, Any]) -> Submitted:
        sections = {key: TINY.get(key, {}) | changes.get(key, {}) for key in {*TINY, *changes}}
        sections["cluster"] = CLUSTER | changes.get("cluster", {})
        recipe = write_recipe(folder, name, **sections)
        run_dir = Path(sections.get("run", {}).get("dir", folder / name))
        prepared.append(Submitted(cluster, recipe, folder / run_dir))
        return prepared[-1]

    yield make
    jobs = [job for run in prepared for job in run.jobs]
    if jobs:
        cluster.run("scancel", *jobs, check=False)


@pytest.fixture(scope="session")
def uninterrupted(prepare_run: Callable[..., Submitted]) -> Submitted:
    """The run that nothing happens to, on two nodes."""
    run = prepare_run("uninterrupted")
    run.submit()
    assert run.wait()["JobState"] == "COMPLETED", run.log()
    assert [step for step, *_ in run.result[0]] == list(range(1, NUM_STEPS + 1))
    return run
