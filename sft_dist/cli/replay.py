"""`sft-dist replay RUN_DIR --step N`: what a step was trained on, and with --loss its loss again, without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.errors import EXIT_DATA, EXIT_DONE

if TYPE_CHECKING:
    from sft_dist.replay import Replayed, Rerun

TOLERANCE = 1e-5  # relative: sums are cut differently for another number of processes or threads


def add_parser(subparsers: Any) -> None:
    """Add the verb `replay`."""
    parser = subparsers.add_parser("replay", help="rebuild the batch of a step", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the optimizer step, counted from 1")
    parser.add_argument("--loss", action="store_true", help="run its forward pass on the CPU and compare the loss")
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 65 when the rebuilt tokens, or a loss that should be exact, are not those of the run."""
    from sft_dist.replay import as_json, rebuild, rerun

    replayed = rebuild(args.run_dir, args.step, lambda text: None)
    found = rerun(replayed) if args.loss else None
    if args.json:
        print(as_json(replayed, found))
    else:
        show(replayed, found)
    faults = list(_faults(replayed, found))
    for fault in faults:
        print(f"sft-dist: error: {args.run_dir}: step {args.step}: {fault}", file=sys.stderr)
    return EXIT_DATA if faults else EXIT_DONE


def show(replayed: Replayed, found: Rerun | None) -> None:
    """Micro-batch by micro-batch, each pack as a bar with its examples below, learned text marked."""
    from rich.console import Console

    from sft_dist.cli.data_views import show_examples, show_packs

    console, step = Console(), replayed.step
    for number in range(len(step.micro_batches)):
        console.rule(f"micro-batch {number} of {len(step.micro_batches)}, step {step.step}, epoch {step.epoch + 1}")
        for pack in (pack for pack in replayed.packs if pack.micro_batch == number):
            show_packs(console, [pack])
            show_examples(console, [replayed.examples[row] for row in pack.rows])
    print(f"step         {step.step}: {step.num_tokens:,} tokens, {step.num_loss_tokens:,} learned")
    told = {None: "not trained yet", True: "the same as in metrics.jsonl", False: "NOT the one in metrics.jsonl"}
    print(f"digest       {replayed.digest[:16]}, {told[replayed.is_same]}")
    if found is not None:
        print(f"loss         {describe(replayed, found)}")


def describe(replayed: Replayed, found: Rerun) -> str:
    recorded = "nothing" if replayed.recorded is None else repr(replayed.recorded["loss"])
    exact = (
        f"weights of step {found.weights_step}, as the step began" if found.is_exact else f"not exact: {found.why_not}"
    )
    return f"{found.loss!r} now, {recorded} recorded ({exact})"


def _faults(replayed: Replayed, found: Rerun | None) -> Any:
    if replayed.is_same is False:
        yield f"its tokens have the digest {replayed.digest[:16]}, metrics.jsonl says {_recorded(replayed)[:16]}"
    if found is None or replayed.recorded is None or not found.is_exact:
        return
    expected = replayed.recorded["loss"]
    if abs(found.loss - expected) > TOLERANCE * abs(expected):
        yield f"its loss is {found.loss!r} with the weights it began with, metrics.jsonl says {expected!r}"


def _recorded(replayed: Replayed) -> str:
    return "" if replayed.recorded is None else str(replayed.recorded["batch_digest"])
