"""Keys and passwords do not belong into a recipe: it is written into the run folder, its logs and its report.

Trackers and hubs read theirs from the environment or from their own key files. What looks like a key is refused before
anything is written, naming where it stands and never what it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sft_dist.config.yaml12 import Branch, Items, Leaf, Node
from sft_dist.errors import ConfigError
from sft_dist.redaction import SHAPES


def refuse_secrets(tree: Branch) -> None:
    """Raise ConfigError naming the first setting that holds what looks like a key."""
    for path, leaf in _leaves(tree, ""):
        for what, shape in SHAPES.items():
            if re.search(shape, leaf.text):
                raise ConfigError(
                    f"{leaf.where}: {path}: holds {what}, which would be written into the run folder: "
                    f"leave it out and put it into the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...)"
                )


def _leaves(node: Node, path: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(node, Leaf):
        yield path, node
    elif isinstance(node, Items):
        for number, child in enumerate(node.children):
            yield from _leaves(child, f"{path}.{number}")
    else:
        for name, child in node.children.items():
            yield from _leaves(child, f"{path}.{name}" if path else name)
