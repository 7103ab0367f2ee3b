"""What the verbs share on the command line: recipes with settings, and errors that are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sft_dist.config.loader import load_recipe
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints travel as ConfigError instead of ending the process, and that guesses no options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {self.prog} --help")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """`RECIPE.yaml [MORE.yaml ...] [key=value ...]` as `args.items`."""
    parser.add_argument(
        "items",
        nargs="+",
        metavar="RECIPE.yaml|key=value",
        help="recipe files, the later ones over the earlier, and settings like optim.lr=1e-4 over them all",
    )


def read_recipe(items: list[str]) -> Recipe:
    """The recipe that `args.items` describes."""
    return load_recipe(*split_arguments(items))
