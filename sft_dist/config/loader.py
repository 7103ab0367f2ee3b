"""Recipe files and command-line settings -> one validated `Recipe`.

files, left to right --(yaml12.parse)--> trees --(overrides.merge)--> one tree
key=value, --key value --(overrides.apply)--> the same tree, last word
tree --(resolve.build_recipe)--> Recipe, or ConfigError with one line per mistake
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft_dist.config import keys, overrides, yaml12
from sft_dist.config.deepspeed_file import adopt_file
from sft_dist.config.export import dump_recipe, json_schema, settings
from sft_dist.config.resolve import build_recipe, node_at
from sft_dist.config.schema import Recipe
from sft_dist.config.secrets import refuse_secrets
from sft_dist.config.shipped import find_shipped
from sft_dist.config.yaml12 import Branch, Leaf
from sft_dist.errors import ConfigError

__all__ = ["adoptions", "dump_recipe", "json_schema", "load_recipe", "load_resolved", "origins"]

MAX_BYTES = 1 << 20


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that these files (left to right) and settings (`a.b=value`) describe.

    Raises ConfigError with one line per mistake: file:line, key, value, rule or remedy.
    """
    return adopt_file(build_recipe(_read_tree(files, overrides)))[0]


def adoptions(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[str]:
    """One line for each thing that the recipe took from `parallel.deepspeed_config`, and for what has no effect."""
    return adopt_file(build_recipe(_read_tree(files, overrides)))[1]


def load_resolved(path: str | Path) -> Recipe:
    """The recipe of a run folder's `config.yaml`; what it once adopted stands in it."""
    return build_recipe(_read_tree([path], ()))


def origins(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each setting of the resolved recipe comes from: `file:line`, `command line` or `default`."""
    tree = _read_tree(files, overrides)
    recipe = build_recipe(tree)
    adopted = settings(adopt_file(recipe)[0])
    where = {path: _origin(tree, path) for path in settings(recipe)}
    return where | {
        path: str(recipe.parallel.deepspeed_config) for path in where if adopted[path] != settings(recipe)[path]
    }


def _origin(tree: Branch, path: str) -> str:
    node, found = node_at(tree, path)
    stands_for_section = isinstance(node, Leaf) and not node.is_null()  # `kernels: reference`
    return node.where if found == path or stands_for_section else "default"


def _read_tree(files: Sequence[str | Path], assignments: Sequence[str]) -> Branch:
    names = " + ".join(str(file) for file in files)
    tree = Branch({}, names or overrides.COMMAND_LINE)
    for file in files:
        tree = _merged(tree, yaml12.parse(_read(file), str(file)))
    tree = Branch(overrides.apply(tree, assignments).children, names or overrides.COMMAND_LINE)
    refuse_secrets(tree)
    return tree


def _merged(tree: Branch, over: Branch) -> Branch:
    merged = overrides.merge(tree, over)
    assert isinstance(merged, Branch)
    return merged


def _read(file: str | Path) -> str:
    path = find_shipped(file)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: too large for a recipe: data files are named in data.sources")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such recipe{_similar(path)}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _similar(path: Path) -> str:
    """A hint at a recipe with a similar name in the same folder."""
    found = sorted(entry.name for entry in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = keys.nearest(path.name, found)
    return (
        f": did you mean '{path.parent / near[0]}'?" if near else ": name a YAML file, or write a setting as key=value"
    )
