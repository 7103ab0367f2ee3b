"""`sft-dist audit RUN_DIR`: prove that every planned example was trained exactly once per epoch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.errors import EXIT_DATA, EXIT_DONE

if TYPE_CHECKING:
    from sft_dist.audit import Audit, Epoch


def add_parser(subparsers: Any) -> None:
    """Add the verb `audit`."""
    parser = subparsers.add_parser("audit", help="prove what a run was trained on", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when the run is proven; 65 with one line per fault when it is not."""
    from sft_dist.audit import as_json, audit
    from sft_dist.cli.progress import shown_progress

    with shown_progress("auditing", "steps") as progress:
        found = audit(args.run_dir, lambda text: None, progress)
    print(as_json(found) if args.json else describe(found))
    for fault in found.faults:
        print(f"sft-dist: error: {args.run_dir}: {fault}", file=sys.stderr)
    return EXIT_DATA if found.faults else EXIT_DONE


def describe(found: Audit) -> str:
    """The findings as lines for a person."""
    ledgers = ", ".join(map(str, found.checkpoints)) or "none"
    verdict = "proven" if not found.faults else f"NOT proven: {len(found.faults):,} faults"
    return "\n".join(
        (
            f"steps        {found.steps:,} of {found.planned_steps:,}, {found.tokens:,} tokens, each step's tokens "
            "compared with the plan's",
            *(f"epoch {epoch.number + 1:<6} {_cover(epoch)}" for epoch in found.epochs),
            f"checkpoints  ledger compared at step {ledgers}",
            f"ledger       {found.ledger[:16]}",
            verdict,
        )
    )


def _cover(epoch: Epoch) -> str:
    state = "finished" if epoch.finished else "running"
    return f"{epoch.trained_once:,} of {epoch.examples:,} examples trained exactly once, {state}"
