"""`sft-dist report RUN_DIR`: one HTML page about a run, also about one that was stopped or still runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft_dist.errors import EXIT_DONE, ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the verb `report`."""
    parser = subparsers.add_parser("report", help="one HTML page about a run", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write RUN_DIR/report.html and print its path."""
    if not any((args.run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{args.run_dir}: holds neither config.yaml nor metrics.jsonl, so it is no run folder")
    from sft_dist.observe.report import write_report

    print(write_report(args.run_dir))
    return EXIT_DONE
