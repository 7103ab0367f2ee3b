"""Command line -> settings: `key=value`, `--key value` and `--key=value`, laid over the recipe files.

["r.yaml", "optim.lr=1e-4", "--data.sources.0.path", "x.json"]
  --(split_arguments)--> files ["r.yaml"], overrides ["optim.lr=1e-4", "data.sources.0.path=x.json"]
  --(apply)-->           the tree of the files with two leaves replaced
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sft_dist.config import keys
from sft_dist.config.yaml12 import Branch, Items, Leaf, Node, parse_value
from sft_dist.errors import ConfigError

COMMAND_LINE = "command line"

_ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
_KEY_OPTION = re.compile(r"--([A-Za-z_]\w*(?:[._][\w.]*)+)")  # our own options have neither dots nor underscores


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(recipe files, overrides as `key=value`). DeepSpeed's `--local_rank=N` is dropped: RANK says the same."""
    files, overrides = [], []
    for item in join_options(arguments):
        match = _ASSIGNMENT.fullmatch(item)
        if match and match[1].replace("-", "_") == "local_rank":
            continue
        if match:
            overrides.append(f"{match[1]}={match[2]}")
        elif item.startswith("-"):
            raise ConfigError(f"{item}: not an option here: settings are written key=value")
        else:
            files.append(item)
    return files, overrides


def join_options(arguments: Sequence[str]) -> list[str]:
    """The same arguments with each `--a.b value` as one `a.b=value`. ConfigError when the value is missing."""
    joined: list[str] = []
    rest = iter(arguments)
    for item in rest:
        key, equals, _ = item.partition("=")
        if not _KEY_OPTION.fullmatch(key):
            joined.append(item)
            continue
        if equals:
            joined.append(item[2:])
            continue
        value = next(rest, "--")
        if value.startswith("--"):
            raise ConfigError(f"{item}: the value is missing: write {item[2:]}=VALUE")
        joined.append(f"{item[2:]}={value}")
    return joined


def apply(tree: Branch, overrides: Sequence[str]) -> Branch:
    """`tree` with every override laid over it, left to right."""
    root: Node = tree
    for item in overrides:
        match = _ASSIGNMENT.fullmatch(item)
        if match is None:
            raise ConfigError(f"{item}: a setting on the command line is written key=value")
        _refuse_undecodable(item)
        root = _put(root, match[1].split("."), parse_value(match[2], COMMAND_LINE), COMMAND_LINE, path="")
    assert isinstance(root, Branch)
    return root


def _refuse_undecodable(item: str) -> None:
    try:
        item.encode()
    except UnicodeEncodeError as error:
        shown = item.encode(errors="backslashreplace").decode()
        raise ConfigError(f"{COMMAND_LINE}: {shown}: not UTF-8: run the terminal in a UTF-8 locale") from error


def merge(base: Node | None, over: Node, path: str = "") -> Node:
    """`over` laid over `base`: mappings key by key, lists and values as a whole.

    A section left empty (`optim:` with every line below it commented out) changes nothing.
    """
    if not isinstance(base, Branch):
        return over
    if isinstance(over, Leaf) and over.is_null() and _is_section(path):
        return base
    if not isinstance(over, Branch):
        return over
    merged = dict(base.children)
    for name, node in over.children.items():
        merged[name] = merge(merged.get(name), node, f"{path}.{name}" if path else name)
    return Branch(merged, over.where)


def _put(node: Node | None, parts: list[str], value: Node, where: str, path: str) -> Node:
    """`node` with `value` at the place that `parts` name below it."""
    if not parts:
        return merge(node, value, path)
    name, below = parts[0], f"{path}.{parts[0]}" if path else parts[0]
    if not name:
        raise ConfigError(f"{where}: {'.'.join([path, *parts])}: an empty name between the dots")
    if isinstance(node, Items) or (node is None and name.isdecimal()):
        return _put_item(node or Items((), where), parts, value, where, path)
    children = dict(node.children) if isinstance(node, Branch) else {}
    children[name] = _put(children.get(name), parts[1:], value, where, below)
    return Branch(children, node.where if isinstance(node, Branch) else where)


def _put_item(items: Items, parts: list[str], value: Node, where: str, path: str) -> Items:
    """A list entry by its index; the index after the last one appends."""
    count = len(items.children)
    if not parts[0].isdecimal() or int(parts[0]) > count:
        raise ConfigError(f"{where}: {path}.{parts[0]}: the list holds {count}: use an index up to {count}")
    position = int(parts[0])
    old = items.children[position] if position < count else None
    new = _put(old, parts[1:], value, where, f"{path}.{position}")
    return Items((*items.children[:position], new, *items.children[position + 1 :]), items.where)


def _is_section(path: str) -> bool:
    key = keys.find(path)
    return key is not None and key.kind == "section"
