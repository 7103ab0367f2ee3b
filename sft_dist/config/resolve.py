"""Settings as written -> plain values that the schema can validate, or every mistake among them at once.

Each mistake is one line: place, key, value, rule or remedy. Keys are looked at first (unknown, of another tool, of a
later version), then values; a recipe with wrong keys is not reported again for what those keys left missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sft_dist.config import foreign, keys
from sft_dist.config.foreign import Advice
from sft_dist.config.keys import Key
from sft_dist.config.overrides import COMMAND_LINE
from sft_dist.config.schema import Recipe
from sft_dist.config.yaml12 import OLD_TRUTH, Branch, Items, Leaf, Node, write_text
from sft_dist.errors import ConfigError

SHORTHANDS = {"kernels"}  # sections that one word may stand for; the schema expands it
_FLOW_SAFE = re.compile(r"[^\s,\[\]{}:#'\"`%@&*!|>?-][^,\[\]{}:#]*(?<!\s)|-?[\d.]+(e-?\d+)?")


def build_recipe(tree: Branch) -> Recipe:
    """The validated recipe. ConfigError with one line per mistake."""
    reader = _Reader(tree)
    values = {"model": {}, "data": {}, **reader.section(tree, "")}
    problems = reader.problems
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = problems + list(_value_problems(error, tree, seen=reader.wrong, only_given=bool(problems)))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems + reader.paste())))
    return recipe


def node_at(tree: Node, path: str) -> tuple[Node, str]:
    """The deepest node on the way to a dotted path, and the part of the path that was found."""
    node, found = tree, []
    for part in path.split(".") if path else []:
        if isinstance(node, Branch) and part in node.children:
            node = node.children[part]
        elif isinstance(node, Items) and part.isdecimal() and int(part) < len(node.children):
            node = node.children[int(part)]
        else:
            break
        found.append(part)
    return node, ".".join(found)


def text_of(node: Node) -> str:
    """A node as flow YAML on one line."""
    if isinstance(node, Leaf):
        return node.text if node.plain and _FLOW_SAFE.fullmatch(node.text) else write_text(node.text)
    if isinstance(node, Items):
        return "[" + ", ".join(text_of(child) for child in node.children) + "]"
    return "{" + ", ".join(f"{name}: {text_of(child)}" for name, child in node.children.items()) + "}"


@dataclass
class _Reader:
    """Walks the tree along the schema, collecting values and problems."""

    tree: Branch
    problems: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)  # paths of known keys whose value is already refused
    advice: list[Advice] = field(default_factory=list)

    def section(self, branch: Branch, path: str) -> dict[str, Any]:
        values = {}
        for name, node in branch.children.items():
            below = f"{path}.{name}" if path else name
            key = keys.find(below) if name in keys.children(path) else None
            if key is None:
                self._unknown(node, below)
            elif key.kind == "section":
                values[name] = self._subsection(node, below)
            elif key.kind == "sections":
                values[name] = self._list_of_sections(node, below)
            else:
                values[name] = self._value(node, below, key)
        return values

    def _subsection(self, node: Node, path: str) -> Any:
        if isinstance(node, Branch):
            return self.section(node, path)
        if isinstance(node, Leaf) and node.is_null():
            return {}
        if path in SHORTHANDS and isinstance(node, Leaf):
            return node.text
        advice = foreign.translate_section(path, text_of(node), self._lookup)
        if advice is not None:
            self._advise(node, path, "is a section here", advice)
        else:
            self._refuse(node, path, f" is a section, not a value: its keys are {', '.join(keys.children(path))}")
        return {}

    def _list_of_sections(self, node: Node, path: str) -> list[Any]:
        if isinstance(node, Items):
            return [self._entry(child, f"{path}.{position}") for position, child in enumerate(node.children)]
        if isinstance(node, Branch):
            self._refuse(node, path, f" is a list: write {path}: [{text_of(node)}]")
        elif not node.is_null():
            self._refuse(node, path, f" is a list: write {path}: [{{path: {text_of(node)}}}]")
        return []

    def _entry(self, node: Node, path: str) -> dict[str, Any]:
        if isinstance(node, Branch):
            return self.section(node, path)
        self._refuse(node, path, f": an entry is a mapping: write {{path: {text_of(node)}}}")
        return {}

    def _value(self, node: Node, path: str, key: Key) -> Any:
        """A plain Python value: text stays text where only text is possible."""
        if isinstance(node, Items):
            return [self._value(child, path, key) for child in node.children]
        if isinstance(node, Branch):
            return {name: self._value(child, path, key) for name, child in node.children.items()}
        if key.keeps_text:
            return None if node.is_null() else node.text
        try:
            value = node.scalar()
        except ConfigError as error:
            self._refuse(node, path, f" = {error}")
            return None
        if isinstance(value, bool) and key.kind == "value" and "boolean" not in key.types:
            self._refuse(node, path, f" = {node.text}: must be {key.rule}")
        if isinstance(value, str) and key.kind == "mapping" and node.plain and value.lower() in OLD_TRUTH:
            self._refuse(node, path, f' = {value}: is text in YAML 1.2: write true or false, or "{value}"')
        return value

    def _unknown(self, node: Node, path: str) -> None:
        """One problem for a key that the schema does not have, with the best remedy there is."""
        parent, _, name = path.rpartition(".")
        advice = foreign.translate(name, text_of(node), self._lookup)
        if advice is not None:
            self._advise(node, path, "is the name of another tool", advice)
        elif not (isinstance(node, Branch) and self._foreign_group(node, path)):
            near = " or ".join(f"'{key}'" for key in keys.suggest(path))
            known = f"the keys {f'of {parent}' if parent else 'at the top'} are {', '.join(keys.children(parent))}"
            self._refuse(node, path, f": unknown key: {f'did you mean {near}?' if near else known}")

    def _foreign_group(self, branch: Branch, path: str) -> bool:
        """Translates the keys below a group like `training_args:`; False when it is rather a misspelt section."""
        parent, _, name = path.rpartition(".")
        foreigners = [child for child in branch.children if child in foreign.NAMES]
        if not foreigners or keys.nearest(name, keys.children(parent), limit=1):
            return False
        for child in foreigners:
            self._unknown(branch.children[child], f"{path}.{child}")
        return True

    def _refuse(self, node: Node, path: str, text: str) -> None:
        self.wrong.add(path)
        self.problems.append(f"{node.where}: {path}{text}")

    def _advise(self, node: Node, path: str, what: str, advice: Advice) -> None:
        remark = f" ({advice.remark})" if advice.remark else ""
        if not advice.settings:
            return self._refuse(node, path, f" {what}: leave it out{remark}")
        if not node.where.startswith(COMMAND_LINE):
            self.advice.append(advice)
        lines = " ".join(_as_written(setting, node.where) for setting in advice.settings)
        return self._refuse(node, path, f" {what}: write {lines}{remark}")

    def paste(self) -> list[str]:
        """With two or more translated lines of files: all of them once more, merged by section, ready to paste."""
        if len(self.advice) < 2:
            return []
        sections: dict[str, dict[str, str]] = {}
        for key, value in (setting for advice in self.advice for setting in advice.settings):
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return ["    in one piece:"] + [
            f"        {section}: {_flow(settings)}" for section, settings in sections.items()
        ]

    def _lookup(self, names: tuple[str, ...]) -> float | None:
        """The number that the recipe gives to the first of `names`, wherever it stands."""
        for name in names:
            for leaf in _leaves(self.tree, name):
                try:
                    return float(leaf.text)
                except ValueError:
                    continue
        return None


def _as_written(setting: tuple[str, str], where: str) -> str:
    """One setting in the form of the place it goes to: `a.b=1` on the command line, `a: {b: 1}` in a file."""
    key, value = setting
    if where.startswith(COMMAND_LINE):
        return f"{key}={value}" if " " not in value else f"'{key}={value}'"
    section, _, name = key.partition(".")
    return f"{section}: {_flow({name: value})}"


def _flow(settings: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in settings.items()) + "}"


def _leaves(node: Node, name: str) -> Iterator[Leaf]:
    if isinstance(node, Branch):
        for key, child in node.children.items():
            if key == name and isinstance(child, Leaf):
                yield child
            yield from _leaves(child, name)


def _value_problems(error: ValidationError, tree: Branch, *, seen: set[str], only_given: bool) -> Iterator[str]:
    """Pydantic's findings in our words, for keys not in `seen`. `only_given`: nothing about what is missing."""
    for finding in error.errors():
        path = _known_path(finding["loc"])
        node, found = node_at(tree, path)
        absent = finding["type"] == "missing" and found != path
        if path in seen or (only_given and (absent or finding["type"] == "value_error")):
            continue
        if finding["type"] == "value_error":
            text = str(finding["ctx"]["error"])
            yield f"{node.where}: {path + ': ' if path else ''}{text}"
            continue
        key = keys.find(path)
        assert key is not None
        if absent:
            yield f"{node.where}: {path} is missing: it must be {key.rule}"
        else:
            yield f"{node.where}: {path} = {_shown(node)}: must be {key.rule}{_meant(node, key)}"


def _known_path(location: tuple[int | str, ...]) -> str:
    """The longest part of pydantic's location that is a key of ours (below it: entries, choices of a union)."""
    parts = [str(part) for part in location]
    while parts and keys.find(".".join(parts)) is None:
        parts.pop()
    return ".".join(parts)


def _meant(node: Node, key: keys.Key) -> str:
    """A hint for a misspelt word."""
    words = [child.text for child in (node.children if isinstance(node, Items) else [node]) if isinstance(child, Leaf)]
    near = [near for word in words for near in keys.nearest(word, key.words)]
    return f" (did you mean {near[0]!r}?)" if near and near[0] not in words else ""


def _shown(node: Node, limit: int = 80) -> str:
    """A value in a message: as written, not longer than a line can bear."""
    text = (node.text or "''") if isinstance(node, Leaf) else text_of(node)
    return text if len(text) <= limit else text[: limit - 3] + "..."
