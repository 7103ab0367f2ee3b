"""A tiny run as `sft-dist submit` hands it to a cluster, and what is asked of it afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.cluster import Cluster
from tiny_run import ROOT, lines, weights

NUM_STEPS = 40
TINY = {
    "data": {"seq_len": 256},
    "batch": {"tokens_per_micro_batch": 256, "tokens_per_step": 512},
    "optim": {"lr": 1e-3, "max_steps": NUM_STEPS},
    "checkpoint": {"every_steps": 10},
    "eval": {"generate": 0, "every_steps": 1000},
}
# A virtual node has one core of this machine: so it takes as many threads as a rank of a laptop does.
ONE_CORE = "taskset -cp $((SLURM_NODEID % $(nproc))) $$ >/dev/null"
CLUSTER = {
    "target": "slurm", "nodes": 2, "processes_per_node": 1, "time": "10", "preflight": False, "setup": [ONE_CORE],
}  # fmt: skip


class Submitted:
    """A run handed to the cluster by `sft-dist submit`."""

    def __init__(self, cluster: Cluster, recipe: Path, run_dir: Path) -> None:
        self.cluster, self.recipe, self.run_dir = cluster, recipe, run_dir
        self.jobs: list[str] = []

    def sft(self, *words: str | Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """`sft-dist WORDS` on the login node, in the project's folder; must exit with `code` (None: any)."""
        search = f"{ROOT}:{ROOT / 'kernels'}"
        done = self.cluster.run(
            sys.executable, "-m", "sft_dist", *words, cwd=self.recipe.parent, check=False, PYTHONPATH=search,
            HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def submit(self, *settings: str) -> str:
        """The id of the (last) job."""
        self.jobs += self.sft("submit", self.recipe, *settings).stdout.split()
        return self.jobs[-1]

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until metrics.jsonl holds `step`."""
        self.cluster.wait(lambda: len(lines(self.run_dir, "step")) >= step, seconds, f"step {step}; {self.log()}")

    def wait_for_steps_of(self, attempt: int, number: int, seconds: float = 120) -> None:
        """Until the workers that were started as this attempt have taken `number` steps: lines of earlier ones stay in
        metrics.jsonl until they are there."""
        own = lambda: [line for line in lines(self.run_dir, "step") if line["attempt"] == attempt]  # noqa: E731
        self.cluster.wait(lambda: len(own()) >= number, seconds, f"attempt {attempt}; {self.log()}")

    def wait(self, job: str | None = None, seconds: float = 180) -> dict[str, str]:
        """The record of the job once it is over."""
        try:
            return self.cluster.wait_job(job or self.jobs[-1], seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def log(self) -> str:
        """The end of what the jobs wrote."""
        return "\n".join(path.read_text()[-3000:] for path in sorted((self.run_dir / "slurm").glob("*.out")))

    @property
    def result(self) -> tuple[list[Any], dict[str, bytes]]:
        """Step and loss of every line, and the exported weights: what must not depend on what happened meanwhile."""
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(self.run_dir, "step")], weights(
            self.run_dir
        )

    @property
    def attempts(self) -> int:
        """How many times workers were started."""
        return len(list((self.run_dir / "logs").glob("attempt_*")))


def workers(cluster: Cluster, node: str) -> list[str]:
    """Processes of a node that train."""
    found = []
    for pid in cluster.pids(node):
        words = cluster.run("cat", f"/proc/{pid}/cmdline", check=False).stdout.split("\0")
        found += [pid] * ("sft_dist.train" in words)
    return found


def secret_of(cluster: Cluster, nodes: Sequence[str]) -> str:
    """The secret of a run's ranks, one on each of `nodes`: the same there, and on no process's command line."""
    ranks = [cluster.run("cat", f"/proc/{pid}/environ").stdout for node in nodes for pid in workers(cluster, node)]
    found = {value for rank in ranks for value in re.findall(r"\0SFT_RUN_SECRET=([0-9a-f]{32})\0", rank)}
    assert len(ranks) == len(nodes) and len(found) == 1, ranks
    (secret,) = found
    everywhere = [
        cluster.run("cat", f"/proc/{pid}/cmdline", check=False).stdout for node in nodes for pid in cluster.pids(node)
    ]
    assert everywhere and secret not in "".join(everywhere)
    return secret


def files_with(folder: Path, text: str) -> list[Path]:
    """Files below `folder` that hold `text`."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
