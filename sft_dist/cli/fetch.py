"""`sft-dist fetch RECIPE.yaml`: bring what the recipe names on hubs into the local cache, for workers that are offline.

Models come as safetensors with config and tokenizer, data sets as the split that is trained on. Gated ones need a token
in the environment (HF_TOKEN) or a login (`hf auth login`); it is never written anywhere. What is on disk is left alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.cli.inputs import check_inputs
from sft_dist.config.schema import ModelSection, Recipe
from sft_dist.data.files import is_url
from sft_dist.errors import EXIT_DONE, ConfigError

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
CODE_FILES = ["*.py"]  # only with model.trust_remote_code


def add_parser(subparsers: Any) -> None:
    """Add the verb `fetch`."""
    parser = subparsers.add_parser("fetch", help="models and data from hubs into the cache", description=__doc__)
    add_recipe_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Fetch everything, one line for each thing."""
    recipe = read_recipe(args.items)
    check_inputs(recipe)
    fetch(recipe, lambda line: print(line, file=sys.stderr, flush=True))
    return EXIT_DONE


def fetch(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Bring everything the recipe names into the cache. Raises ConfigError naming what cannot be had."""
    for key, repo, patterns in wanted_models(recipe.model):
        say(f"{key}={repo}: in {_snapshot(key, repo, recipe.model.revision, patterns)}")
    for key, source in _sources(recipe):
        if source.streaming:
            say(f"warning: {key}={source.path}: is streamed: nodes must reach it while they train")
        elif is_url(source.path):
            say(f"warning: {key}={source.path}: nodes must reach it, or prepare the data here: sft-dist data prepare")
        elif not _is_here(source.path):
            from sft_dist.data import hub

            if hub.is_hub_id(source.path):
                dataset = hub.load(source.path, source.subset, source.split, source.revision)
                say(f"{key}={source.path}: {len(dataset)} rows in the cache")


def wanted_models(model: ModelSection) -> Iterator[tuple[str, str, list[str]]]:
    """(key, hub id, patterns of files) of each part of the model that is not on disk."""
    code = CODE_FILES if model.trust_remote_code else []
    if model.path and not Path(model.path).exists():
        weights = WEIGHT_FILES if model.init == "pretrained" else []
        yield "model.path", model.path, [*TOKENIZER_FILES, *weights, *code]
    if model.tokenizer and model.tokenizer != model.path and not Path(model.tokenizer).exists():
        yield "model.tokenizer", model.tokenizer, [*TOKENIZER_FILES, *code]


def _sources(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for name in ("sources", "eval_sources", "test_sources"):
        for number, source in enumerate(getattr(recipe.data, name)):
            yield f"data.{name}.{number}.path", source


def _is_here(path: str) -> bool:
    return Path(path).exists() or any(sign in path for sign in "*?[")


def _snapshot(key: str, repo: str, revision: str | None, patterns: list[str]) -> str:
    """The cached folder of a repository, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ConfigError(f"{key}={repo}: is gated: accept its terms on the hub, then set HF_TOKEN") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at model.revision={revision}" if revision else ""
        raise ConfigError(f"{key}={repo}{at}: not on the hub, or private: check the name, or set HF_TOKEN") from error
    except Exception as error:  # the network below raises what it likes
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{key}={repo}: {what}: run `sft-dist fetch` once where the hub can be reached (HF_HUB_OFFLINE unset)"
        ) from error
