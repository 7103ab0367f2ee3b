"""`sft-dist doctor [RECIPE]`: can training run on this machine, and what would make it better?"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.cli.arguments import read_recipe
from sft_dist.data.cache import cache_root
from sft_dist.errors import EXIT_DONE, EXIT_USAGE

if TYPE_CHECKING:
    from sft_dist.doctor import Finding

_MARKS = {"ok": " ", "note": "!", "blocked": "X"}


def add_parser(subparsers: Any) -> None:
    """Add the verb `doctor`."""
    parser = subparsers.add_parser("doctor", help="can training run on this machine?", description=__doc__)
    parser.add_argument(
        "items",
        nargs="*",
        metavar="RECIPE.yaml|key=value",
        help="whose run.dir and data.cache_dir are tried; without one: runs/ here",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="look at the nodes of RECIPE.yaml CLUSTER.yaml: a job of its own on Slurm",
    )
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when training can run; 2 with the first problem that keeps it from running."""
    if args.cluster:
        from sft_dist.cli.nodes import examine_nodes

        return examine_nodes(read_recipe(args.items), as_json=args.json)
    run_dir, cache_dir = Path("runs/run"), Path("runs/.sft-cache")
    if args.items:
        recipe = read_recipe(args.items)
        run_dir, cache_dir = Path(recipe.run.dir), cache_root(recipe)
    from sft_dist.doctor import blocking, examine

    findings = []
    for finding in examine(run_dir, cache_dir):
        findings.append(finding)
        if not args.json:
            print(describe(finding), flush=True)
    problem = blocking(findings)
    if args.json:
        print(json.dumps({"can_train": problem is None, "findings": [asdict(f) for f in findings]}, indent=2))
    if problem is None:
        return EXIT_DONE
    print(f"sft-dist: error: {problem.part}: {problem.found}: {problem.remedy}", file=sys.stderr)
    return EXIT_USAGE


def describe(finding: Finding) -> str:
    """One line; what to do stands below it."""
    line = f"{_MARKS[finding.state]} {finding.part:<15} {finding.found}"
    return f"{line}\n{'':18}-> {finding.remedy}" if finding.remedy else line
