"""`sft-dist submit RECIPE.yaml CLUSTER.yaml`: the same run as `train`, on Slurm. Prints the job id."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.cli.inputs import check_inputs
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE
from sft_dist.launch import scheduler
from sft_dist.launch.submission import JOBS, JobKind, check_cluster, sbatch_command, slurm_dir, write_files


def add_parser(subparsers: Any) -> None:
    """Add the verb `submit`."""
    parser = subparsers.add_parser("submit", help="fine-tune on a Slurm cluster", description=__doc__)
    add_recipe_arguments(parser)
    kinds = ("train", "prepare", "preflight")
    parser.add_argument("--job", choices=kinds, default="train", help="prepare: tokenise on a CPU node")
    parser.add_argument("--dry-run", action="store_true", help="print the exact sbatch line; write and start nothing")
    parser.add_argument("--no-fetch", action="store_true", help="models and data are in the cache or on disk already")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check, fetch, write RUN_DIR/slurm, sbatch."""
    recipe = read_recipe(args.items)
    check_cluster(recipe)
    check_inputs(recipe)
    if args.dry_run:
        print(shlex.join(sbatch_command(recipe, job=args.job)))
        return EXIT_DONE
    if not args.no_fetch:
        from sft_dist.cli.fetch import fetch

        fetch(recipe, lambda line: print(line, file=sys.stderr, flush=True))
    for job in submit(recipe, args.job):
        print(job, flush=True)
    print(f"next: sft-dist slurm status {shlex.quote(recipe.run.dir)}, or logs, cancel, requeue", file=sys.stderr)
    return EXIT_DONE


def submit(recipe: Recipe, kind: JobKind) -> list[str]:
    """Write what the job reads and hand it over; the ids, also kept in the run folder."""
    submission = time.strftime("%Y%m%dT%H%M%S") + f".{time.time_ns() % 10**9:09d}"
    write_files(recipe, submission)
    jobs = submit_chain(recipe) if kind == "train" else [scheduler.submit(sbatch_command(recipe, job=kind))]
    for job in jobs:
        note_job(recipe, job, submission)
    return jobs


def submit_chain(recipe: Recipe) -> list[str]:
    """Ids of the jobs handed over: one, or each link of a chain after the one before."""
    jobs: list[str] = []
    for _ in range(recipe.cluster.chain):
        jobs.append(scheduler.submit(sbatch_command(recipe, after=jobs[-1] if jobs else None)))
    return jobs


def note_job(recipe: Recipe, job: str, submission: str) -> None:
    """Remember the job in the run folder, where `sft-dist slurm` looks for it."""
    line = {"job": job, "submission": submission, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    with (slurm_dir(Path(recipe.run.dir)) / JOBS).open("a") as file:
        file.write(json.dumps(line) + "\n")
