"""`sft-dist train`: start a run on this machine, or be a worker of the launcher that started this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from sft_dist.cli.arguments import add_recipe_arguments
from sft_dist.cli.inputs import check_inputs
from sft_dist.config.loader import adoptions, load_recipe
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.config.srun import is_srun_task
from sft_dist.errors import ConfigError
from sft_dist.resilience.beginning import begin_as_worker
from sft_dist.resilience.ending import run_and_end


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("train", help="fine-tune on this machine", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="worker processes (default: all visible GPUs, else 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe and its files, print both, start nothing"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    files, overrides = split_arguments(args.items)
    if inside_launcher(os.environ) and not args.dry_run:
        begin_as_worker()
        from sft_dist import worker

        run_and_end(lambda: worker.main([*files, *overrides]))
    recipe = load_recipe(files, overrides)
    check_inputs(recipe)
    if recipe.cluster.target != "local" and not args.dry_run and not on_its_machines(os.environ):
        return go_there(recipe, args)
    for line in adoptions(files, overrides):
        print(line)
    from sft_dist.launch import local

    return local.run(files, overrides, args.nproc, args.dry_run)


def on_its_machines(environ: Mapping[str, str]) -> bool:
    """Whether this process is already where `cluster:` wants the run: in a Slurm job, or below worker.sh."""
    return "SFT_NNODES" in environ or "SLURM_JOB_ID" in environ


def go_there(recipe: Recipe, args: argparse.Namespace) -> int:
    """With cluster.target=ssh: become launch/ssh.sh. Slurm has a verb of its own."""
    from sft_dist.launch.ssh import run_over_ssh

    if recipe.cluster.target == "slurm":
        raise ConfigError("cluster.target=slurm: hand it over with sft-dist submit, or say cluster.target=local")
    if args.nproc is not None:
        raise ConfigError(f"--nproc {args.nproc}: is for this machine: set cluster.processes_per_node")
    return run_over_ssh(recipe, args.items)


def inside_launcher(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate, deepspeed or srun started this process as one of its workers."""
    return "RANK" in environ or is_srun_task(environ)
