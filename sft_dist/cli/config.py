"""`sft-dist config`: what a recipe means, before anything runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.cli.inputs import check_inputs
from sft_dist.config.export import annotate_recipe, json_schema, settings
from sft_dist.config.loader import adoptions, load_recipe, origins
from sft_dist.config.overrides import split_arguments
from sft_dist.config.world import describe_world
from sft_dist.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    config = subparsers.add_parser("config", help="show, compare and check recipes", description=__doc__)
    verbs = config.add_subparsers(required=True, metavar="VERB")
    table = {
        "show": (show, "every setting, with the place it comes from"),
        "diff": (diff, "what differs between two recipes, or between one and the defaults"),
        "check": (check, "validate the recipe and look for the files it names"),
    }
    for name, (func, text) in table.items():
        parser = verbs.add_parser(name, help=text, description=text)
        add_recipe_arguments(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")
        if func is check:
            parser.add_argument("--nproc", type=int, metavar="N", help="also say what it means for N processes")
        parser.set_defaults(func=func)
    parser = verbs.add_parser(
        "schema", help="JSON Schema of recipes, for editors", description="Print the JSON Schema: one for all recipes."
    )
    parser.add_argument("items", nargs="*", metavar="RECIPE.yaml", help="may be given; the schema is the same")
    parser.set_defaults(func=schema)


def show(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.items)
    where = origins(*split_arguments(args.items))
    if args.json:
        print(json.dumps({"recipe": recipe.model_dump(mode="json"), "origins": where}, indent=2))
    else:
        print(annotate_recipe(recipe, where), end="")
    return 0


def diff(args: argparse.Namespace) -> int:
    """Settings on the command line belong to the last recipe: `diff R.yaml R.yaml optim.lr=1e-4` is a what-if."""
    files, overrides = split_arguments(args.items)
    if len(files) > 2:
        raise ConfigError(f"config diff compares one or two recipes, not {len(files)}")
    new = settings(load_recipe(files[-1:], overrides))
    old = settings(load_recipe(files[:1])) if len(files) == 2 else _defaults()
    changes = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    if args.json:
        print(json.dumps({key: {"old": before, "new": after} for key, (before, after) in changes.items()}, indent=2))
    else:
        width = max(map(len, changes), default=0)
        for key, (before, after) in changes.items():
            print(f"{key:<{width}}  {json.dumps(before)} -> {json.dumps(after)}")
    return 0


def check(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.items)
    check_inputs(recipe)
    given = sum(place != "default" for place in origins(*split_arguments(args.items)).values())
    if args.nproc is not None and args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc}: must be at least 1")
    world = describe_world(recipe, args.nproc) if args.nproc else None
    if args.json:
        print(json.dumps({"ok": True, "settings": given, "world": world}))
        return 0
    print(f"ok: {given} settings given, the rest are defaults; every named file is there")
    for line in [*adoptions(*split_arguments(args.items)), *([world] if world else [])]:
        print(f"    {line}")
    return 0


def schema(args: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0


def _defaults() -> dict[str, Any]:
    """The settings of a recipe that says nothing; what every recipe must say itself is left out."""
    least = settings(load_recipe([], ["model.path=any", "data.sources=[{path: any}]"]))
    return {key: value for key, value in least.items() if not key.startswith(("model.path", "data.sources"))}
