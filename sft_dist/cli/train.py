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
from sft_dist.config.srun import is_srun_task
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
        from sft_dist import train

        run_and_end(lambda: train.main([*files, *overrides]))
    check_inputs(load_recipe(files, overrides))
    for line in adoptions(files, overrides):
        print(line)
    from sft_dist.launch import local

    return local.run(files, overrides, args.nproc, args.dry_run)


def inside_launcher(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate, deepspeed or srun started this process as one of its workers."""
    return "RANK" in environ or is_srun_task(environ)
