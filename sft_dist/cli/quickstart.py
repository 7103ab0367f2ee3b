"""`sft-dist quickstart`: a real fine-tune from nothing in minutes, always anew, measured before and after.

generate skills -> runs/quickstart-data     instructions with checkable answers, a tokenizer, a held-out part
train           -> runs/quickstart          2 processes on CPU, one per GPU where there are any, packed sequences
compare                                     exact answers by skill, base and tuned answers side by side
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sft_dist.config.loader import load_recipe, load_resolved
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, ConfigError, StorageError

RECIPE = "configs/quickstart.yaml"
NUM_TRAIN = 100_000  # conversations
NUM_TEST = 510  # thirty for each skill
CPU_PROCESSES = 2
BEFORE_A_CONFIG = {"lock", "lease.json", "logs"}  # what a run leaves that ended before it wrote its config.yaml


def add_parser(subparsers: Any) -> None:
    """Add the verb `quickstart`."""
    parser = subparsers.add_parser(
        "quickstart",
        help="a small fine-tune from nothing, measured before and after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("items", nargs="*", metavar="key=value", help=f"settings over those of {RECIPE}")
    parser.add_argument("--nproc", type=int, metavar="N", help="worker processes (default: all visible GPUs, else 2)")
    parser.add_argument(
        "--examples", type=int, default=NUM_TRAIN, metavar="N", help="training conversations (default: %(default)s)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Generate, train, compare; returns the training's exit code."""
    files, overrides = split_arguments(args.items)
    if files:
        raise ConfigError(f"{files[0]}: quickstart has its own recipe: sft-dist train {files[0]}")
    if args.examples < 1:
        raise ConfigError(f"--examples {args.examples}: must be at least 1")
    started = time.monotonic()
    recipe = load_recipe([RECIPE], overrides)
    renew(recipe, args.examples)
    from sft_dist.launch import local
    from sft_dist.launch.job import count_gpus

    nproc = args.nproc if args.nproc is not None else count_gpus(os.environ) or CPU_PROCESSES
    code = local.run([RECIPE], overrides, nproc, False)
    if code == EXIT_DONE:
        _compare(Path(recipe.run.dir), time.monotonic() - started)
    return code


def renew(recipe: Recipe, num_train: int) -> None:
    """Clear the run folder of an earlier quickstart and write the data; the folder is held meanwhile.

    Raises ConfigError when the folder holds anything else, LockedError when a run is still at work in it.
    """
    from sft_dist.resilience.lock import LOCK_NAME, RunLock

    run_dir = Path(recipe.run.dir)
    _refuse_foreign(run_dir, recipe.run.name)
    with RunLock.acquire(run_dir):
        try:
            for entry in run_dir.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != LOCK_NAME:
                    entry.unlink()
            _write_data(recipe, num_train)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}: make room or make it writable") from error


def _write_data(recipe: Recipe, num_train: int) -> None:
    """The recipe's training file, held-out file and tokenizer."""
    from sft_dist.generate.skills import write_skills

    folder = Path(recipe.data.sources[0].path).parent
    started = time.monotonic()
    write_skills(folder, seed=recipe.run.seed, num_train=num_train, num_test=NUM_TEST)
    print(
        f"{folder}: {num_train:,} generated conversations to train on, {NUM_TEST} held out, "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )


def _refuse_foreign(run_dir: Path, name: str) -> None:
    """Only what a quickstart wrote may be removed unasked."""
    found = {entry.name for entry in run_dir.iterdir()} if run_dir.is_dir() else set()
    if found <= BEFORE_A_CONFIG:
        return
    config = run_dir / "config.yaml"
    if not config.is_file() or load_resolved(config).run.name != name:
        raise ConfigError(f"run.dir={run_dir}: holds something else than a quickstart: choose another, or remove it")


def _compare(run_dir: Path, seconds: float) -> None:
    from rich.console import Console

    from sft_dist.cli.before_after import answers_table, read_pairs, skills_table
    from sft_dist.observe.answers import scores
    from sft_dist.observe.run_files import read_lines

    records = read_lines(run_dir / "exact_match.jsonl")
    console = Console(highlight=False)
    for table in (skills_table(scores(records)), answers_table(read_pairs(records))):
        console.print()
        console.print(table)
    console.print()
    console.print(f"quickstart took {seconds / 60:.1f} min   report: {run_dir / 'report.html'}", markup=False)
    console.print(f"talk to it: sft-dist chat {run_dir / 'export'}", markup=False)
