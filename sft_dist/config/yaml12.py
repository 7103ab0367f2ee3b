"""Recipe text -> a tree that remembers where each setting was written.

    text --(ruamel.yaml: scanner and parser)--> events --(here)--> Branch / Items / Leaf, each with `file:line`

Only the grammar comes from the library. Words get their meaning here, by the YAML 1.2 core schema, and only when a
value is asked for: `no` and `on` are text, `1e-5` is a number, and what two YAML versions read differently (`0123`)
is refused with the two ways to write it. Refused as well: duplicate keys, tags, merge keys, several documents in one
file, aliases that multiply into more than `MAX_NODES` nodes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from sft_dist.errors import ConfigError

MAX_NODES = 10_000
MAX_DEPTH = 40

OLD_TRUTH = {"yes", "no", "on", "off"}  # true and false in YAML 1.1, text in 1.2

Scalar = str | int | float | bool | None

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN = re.compile(r"([^\W\d]|[./~])[\w ./+=@~-]*(?<! )")  # cannot be taken for a number, a date or YAML's own signs
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
)  # what YAML forbids, or folds, beyond JSON's escapes
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One scalar as written. `where` is `file:line` of the key that holds it."""

    text: str
    plain: bool  # written without quotes: may be a number, a truth value or null
    where: str

    def scalar(self) -> Scalar:
        """Its value by the core schema. ConfigError for a number with leading zeros."""
        return read_scalar(self.text) if self.plain else self.text

    def is_null(self) -> bool:
        return self.plain and self.text in _NULL


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    children: tuple[Node, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A mapping; keys are text, always."""

    children: dict[str, Node]
    where: str


Node = Leaf | Items | Branch


def read_scalar(text: str) -> Scalar:
    """The value of an unquoted word: null, true/false, a number, otherwise the text itself.

    Source: YAML 1.2.2, section 10.3 (core schema), plus `_` between digits as in Python.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _LEADING_ZERO.fullmatch(text):
        digits = text.lstrip("+-0_") or "0"
        raise ConfigError(
            f'{text}: a leading zero means octal to some and nothing to others: write {digits}, or "{text}"'
        )
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _RADIX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF_NAN.fullmatch(text):
        return math.nan if text.lower() == ".nan" else float(text.replace(".", ""))
    return text


def write_scalar(value: Scalar) -> str:
    """The word for a value, such that `read_scalar`, and readers of YAML 1.1 as well, give the value back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return repr(value) if isinstance(value, int | float) else write_text(value)


def write_text(text: str) -> str:
    """`text` bare where it can only be text, otherwise in double quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in OLD_TRUTH and read_scalar(text) == text:
        return text
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def parse(text: str, name: str) -> Branch:
    """The mapping that a recipe file holds. `name` stands before the line number in errors."""
    node = _Builder(text, name).document()
    if isinstance(node, Leaf) and node.is_null():
        return Branch({}, f"{name}:1")
    if not isinstance(node, Branch):
        raise ConfigError(f"{name}:1: a recipe is a mapping of sections, like `model: {{path: ...}}`")
    return node


def parse_value(text: str, where: str) -> Node:
    """The value of `key=value`: flow YAML when it opens with a bracket or a quote, otherwise one plain word."""
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        return Leaf(text.strip(), plain=True, where=where)
    return _Builder(text, where, lines=False).document()


@dataclass
class _Builder:
    """Recursive descent over the parser's events."""

    text: str
    name: str
    lines: bool = True
    anchors: dict[str, tuple[Node, int]] = field(default_factory=dict)
    num_nodes: int = 0

    def document(self) -> Node:
        events = YAML(typ="safe", pure=True).parse(self.text)
        try:
            return self._only_document(events)
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            text = "" if self.lines else f" in {self.text}"
            raise ConfigError(f"{self.place(line)}: not YAML: {error.problem or error.context}{text}") from error
        except YAMLError as error:
            raise ConfigError(f"{self.name}: not YAML: {str(error).splitlines()[0]}") from error

    def _only_document(self, events: Iterator[Any]) -> Node:
        root: Node | None = None
        for event in events:
            if isinstance(event, DocumentStartEvent):
                line = event.start_mark.line + 1
                if root is not None:
                    raise ConfigError(f"{self.place(line)}: a second document (`---`): put it into a file of its own")
                root = self.node(next(events), events, self.place(line), depth=0)
        return root if root is not None else Leaf("", plain=True, where=self.place(1))

    def place(self, line: int) -> str:
        return f"{self.name}:{line}" if self.lines else self.name

    def node(self, event: Any, events: Iterator[Any], where: str, depth: int) -> Node:
        """The node that starts with `event`; `where` is the place of its key."""
        if isinstance(event, AliasEvent):
            return self._alias(event, where)
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{where}: tags like {event.tag} are not part of a recipe: leave it out, quote text")
        before = self.num_nodes
        self._count(1, where)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        node: Node
        if isinstance(event, ScalarEvent):
            node = Leaf(event.value, plain=event.style is None, where=where)
        elif isinstance(event, MappingStartEvent):
            node = self._branch(events, where, depth)
        else:
            assert isinstance(event, SequenceStartEvent)
            node = self._items(events, where, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, self.num_nodes - before)
        return node

    def _branch(self, events: Iterator[Any], where: str, depth: int) -> Branch:
        children: dict[str, Node] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            place = self.place(event.start_mark.line + 1)
            key = self._key(event, place)
            if key in children:
                raise ConfigError(f"{place}: duplicate key {key!r}: first written at {children[key].where}, keep one")
            children[key] = self.node(next(events), events, place, depth + 1)
        return Branch(children, where)

    def _key(self, event: Any, place: str) -> str:
        if not isinstance(event, ScalarEvent) or event.tag is not None:
            raise ConfigError(f"{place}: a key must be one word")
        if event.value == "<<" and event.style is None:
            raise ConfigError(
                f"{place}: merge keys (<<) left YAML with version 1.2: put shared settings into a first file"
            )
        return str(event.value)

    def _items(self, events: Iterator[Any], where: str, depth: int) -> Items:
        children = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            children.append(self.node(event, events, self.place(event.start_mark.line + 1), depth + 1))
        return Items(tuple(children), where)

    def _alias(self, event: AliasEvent, where: str) -> Node:
        if event.anchor not in self.anchors:
            raise ConfigError(f"{where}: *{event.anchor} refers to nothing: write &{event.anchor} before it")
        node, size = self.anchors[event.anchor]
        self._count(size, where)
        return node

    def _count(self, more: int, where: str) -> None:
        self.num_nodes += more
        if self.num_nodes > MAX_NODES:
            raise ConfigError(f"{where}: more than {MAX_NODES} values once aliases are expanded")
