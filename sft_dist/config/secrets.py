"""Keys and passwords do not belong into a recipe: it is written into the run folder, its logs and its report.

Trackers and hubs read theirs from the environment or from their own key files. What looks like a key is refused before
anything is written, naming where it stands and never what it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sft_dist.config.yaml12 import Branch, Items, Leaf, Node
from sft_dist.errors import ConfigError

# The public shapes of keys, and the places where URLs carry them.
_SHAPES = {
    "a password in a URL": r"://[^/\s:@]*:[^/\s@]+@",
    "a signature in a URL": r"[?&](X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|sig|access_token|token)=",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\bgh[opsur]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def refuse_secrets(tree: Branch) -> None:
    """Raise ConfigError naming the first setting that holds what looks like a key."""
    for path, leaf in _leaves(tree, ""):
        for what, shape in _SHAPES.items():
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
