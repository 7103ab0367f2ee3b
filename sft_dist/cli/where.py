"""`sft-dist where RUN_DIR`: where each rank of a run on this machine is, and which one the others wait for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.errors import EXIT_DONE
from sft_dist.launch.where import Place, find_ranks
from sft_dist.resilience.heartbeat import PHASES


def add_parser(subparsers: Any) -> None:
    """Add the verb `where`."""
    parser = subparsers.add_parser("where", help="where each rank of a run is", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Look once; the ranks are not disturbed."""
    places = find_ranks(args.run_dir)
    if args.json:
        print(json.dumps([asdict(place) for place in places], indent=2))
        return EXIT_DONE
    print("\n".join(explain(places)) or f"no rank of {args.run_dir} runs on this machine")
    return EXIT_DONE


def explain(places: Sequence[Place]) -> list[str]:
    """One line for each rank; where ranks are at different places, the ones that are behind are named first."""
    lines = [f"rank {place.rank} on {place.host} (process {place.pid}): {place}" for place in places]
    positions = [(place.step, PHASES.index(place.phase)) for place in places]
    late = [str(place.rank) for place, at in zip(places, positions, strict=True) if at == min(positions)]
    if len(late) < len(places):
        many = len(late) > 1
        lines.insert(0, f"behind: rank{'s' * many} {', '.join(late)}; the others wait for {'them' if many else 'it'}")
    return lines
