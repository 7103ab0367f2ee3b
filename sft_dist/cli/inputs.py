"""Do the files exist that a recipe names? Asked before a run, so that a typo costs a second and not a queue slot."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from sft_dist.config.schema import Recipe
from sft_dist.data.builtin_templates import BUILTIN
from sft_dist.data.files import is_url
from sft_dist.data.hub import is_hub_id
from sft_dist.errors import ConfigError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_inputs(recipe: Recipe) -> None:
    """Raise ConfigError with one line for each named file or folder that is not there. Hub ids are not looked up."""
    missing = [*_missing_models(recipe), *_missing_sources(recipe), *_missing_template(recipe)]
    if missing:
        raise ConfigError("\n".join(missing))


def _missing_models(recipe: Recipe) -> list[str]:
    named = {"model.path": recipe.model.path, "model.tokenizer": recipe.model.tokenizer}
    return [
        f"{key} = {path}: no such folder, and not a hub id (owner/name)"
        for key, path in named.items()
        if path and not Path(path).exists() and not _HUB_ID.fullmatch(path)
    ]


def _missing_sources(recipe: Recipe) -> list[str]:
    data = recipe.data
    named = {"sources": data.sources, "eval_sources": data.eval_sources, "test_sources": data.test_sources}
    return [
        f"data.{name}.{position}.path = {source.path}: no such file, folder or pattern (from {Path.cwd()})"
        for name, sources in named.items()
        for position, source in enumerate(sources)
        if not (is_url(source.path) or is_hub_id(source.path))
        and not glob.glob(source.path, recursive=True)
        and not Path(source.path).exists()
    ]


def _missing_template(recipe: Recipe) -> list[str]:
    """Neither a name that comes with the project nor a file."""
    template = recipe.data.chat_template
    known = template in ("auto", *BUILTIN) or Path(template).is_file()
    return [] if known else [f"data.chat_template = {template}: no such file, and none of auto, {', '.join(BUILTIN)}"]
