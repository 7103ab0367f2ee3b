"""`sft-dist eval MODEL RECIPE`: held-out loss and exact answers of an exported folder, an adapter or a hub id."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from sft_dist.evaluate.exported import Measurement


def add_parser(subparsers: Any) -> None:
    """Add the verb `eval`."""
    parser = subparsers.add_parser("eval", help="held-out loss and answers of a model", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model folder such as RUN_DIR/export, or a hub id")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--num", type=int, metavar="N", help="prompts whose answer is checked (default: eval.exact_match of the recipe)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure on the recipe's test split, else on its eval split."""
    if args.num is not None and args.num < 0:
        raise ConfigError(f"--num {args.num}: must be 0 (check no answers) or more")
    recipe = read_recipe(args.items)
    import torch

    from sft_dist.config.auto import compute_dtype
    from sft_dist.evaluate.exported import measure
    from sft_dist.models.load import DTYPES
    from sft_dist.models.speaker import load_speaker

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speaker = load_speaker(args.model, dtype=DTYPES[compute_dtype(recipe, device.type)], device=device)
    num = recipe.eval.exact_match if args.num is None else args.num
    found = measure(speaker, args.model, recipe, num, notice=lambda text: print(text, file=sys.stderr))
    print(json.dumps({"model": args.model, **asdict(found)}, indent=2) if args.json else describe(args.model, found))
    return EXIT_DONE


def describe(model: str, found: Measurement) -> str:
    """The figures as lines for a person."""
    checked = "not checked (--num N)"
    if found.exact_match is not None:
        checked = f"{found.exact_match:.1%} of {found.num_checked:,} answers"
    return "\n".join(
        (
            f"model        {model}",
            f"split        {found.split}, {found.num_examples:,} examples",
            f"loss         {found.eval_loss:.4f} per supervised token, over {found.num_loss_tokens:,}",
            f"exact match  {checked}",
        )
    )
