"""`sft-dist doctor --cluster RECIPE.yaml CLUSTER.yaml`: the preflight alone, on the nodes that the run would get."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from sft_dist.cli.submit import submit
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, EXIT_HARDWARE, ConfigError
from sft_dist.launch import scheduler
from sft_dist.launch.submission import check_cluster

_POLL_SECONDS = 1.0
_REPORT, _BAD_NODES = "report.json", "bad_nodes"  # as sft_dist.preflight writes them


def examine_nodes(recipe: Recipe, *, as_json: bool) -> int:
    """Submit the preflight, wait for it, tell what it found. Exits 77 when a node is bad."""
    check_cluster(recipe)
    (job,) = submit(recipe, "preflight")
    print(f"preflight: job {job} on {recipe.cluster.nodes} nodes", file=sys.stderr, flush=True)
    while not all(scheduler.has_ended(record) for record in scheduler.records(job)):
        time.sleep(_POLL_SECONDS)
    path = Path(recipe.run.dir) / "logs" / f"preflight-{job}.0" / _REPORT
    if not path.is_file():
        raise ConfigError(f"preflight: job {job} left no report: see {recipe.run.dir}/slurm/{job}.out")
    report = json.loads(path.read_text())
    if as_json:
        print(json.dumps(report, indent=2))
    for node in () if as_json else filter(None, report["nodes"]):
        print(describe(node))
    for complaint in report["complaints"]:
        print(f"sft-dist: error: node {complaint['name']}: {complaint['what']}", file=sys.stderr)
    if bad := path.with_name(_BAD_NODES).read_text().split():
        print(f"to do without: cluster.exclude={','.join(bad)}", file=sys.stderr)
    return EXIT_HARDWARE if report["complaints"] else EXIT_DONE


def describe(node: dict[str, Any]) -> str:
    """One line about a node that has told its facts."""
    speeds = {"all-reduce": node["gigabytes_per_second"], "link": node["link_gigabytes_per_second"]}
    found = [f"{name} {1000 * speed:,.0f} MB/s" for name, speed in speeds.items() if speed]
    same = node["same"]
    return ", ".join([f"{node['name']}: GPUs {same['GPUs']}", f"torch {same['torch']}", *found])
