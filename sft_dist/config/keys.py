"""What the schema knows about every key: its kind, the rule for its value in words, and which key a typo meant.

The index is made once from the JSON Schema of `Recipe`, so a new field in schema.py is known here without a line.
Entries of lists are written with `*`: `data.sources.*.path`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.config.schema import Recipe

Kind = Literal["section", "sections", "mapping", "value"]  # `sections`: a list of them; `mapping`: keys are the user's


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the recipe."""

    path: str  # dotted, `*` for a list index
    kind: Kind
    rule: str  # "a whole number > 0, or auto"
    words: tuple[str, ...]  # the words it accepts
    types: frozenset[str]  # JSON types of its scalars, those inside lists included

    @property
    def keeps_text(self) -> bool:
        """Only text is possible here, so an unquoted 123 or `no` is that text."""
        return not self.words and self.types <= {"string", "null"} and "string" in self.types


def find(path: str) -> Key | None:
    """The key at a dotted path, list indices included."""
    return index().get(generic(path))


def generic(path: str) -> str:
    """`data.sources.0.path` -> `data.sources.*.path`."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def children(path: str) -> list[str]:
    """Names of the keys directly below a section ("" is the top)."""
    prefix = f"{generic(path)}." if path else ""
    return [key[len(prefix) :] for key in index() if key.startswith(prefix) and "." not in key[len(prefix) :]]


def suggest(path: str) -> list[str]:
    """The keys that an unknown key may have meant, best first; empty when nothing is near.

    A near sibling wins, then the same word elsewhere (`lr` at the top), then what is farther off.
    """
    parent, _, name = path.rpartition(".")
    for limit in (1, None):
        here = nearest(name, children(parent), limit)
        found = [f"{parent}.{word}" if parent else word for word in here] or _elsewhere(name, limit=limit and limit - 1)
        if found:
            return found
    return []


def _elsewhere(name: str, limit: int | None) -> list[str]:
    """Keys of any section whose last word is near; entries of lists have no path of their own to offer."""
    last = {key: key.rpartition(".")[2] for key in index() if "*" not in key}
    near = nearest(name, last.values(), limit)
    return [key for key, word in last.items() if word in near]


def nearest(word: str, candidates: Iterable[str], limit: int | None = None) -> list[str]:
    """Candidates with the fewest edits to `word`: all that tie, none beyond `limit` (default: a third of the word)."""
    word = _folded(word)
    distances = {candidate: edits(word, candidate.lower()) for candidate in candidates}
    allowed = max(1, len(word) // 3) if limit is None else limit
    best = min(distances.values(), default=allowed + 1)
    return [candidate for candidate, distance in distances.items() if distance == best <= allowed]


def edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours between two words (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


@functools.cache
def index() -> dict[str, Key]:
    """Every key of the recipe, in the order of the schema."""
    schema = Recipe.model_json_schema()
    return {key.path: key for key in _keys(schema, schema["$defs"], prefix="")}


def _keys(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterable[Key]:
    for name, spec in section["properties"].items():
        path = prefix + name
        kind, inner = _kind(spec)
        yield Key(path, kind, describe(spec), tuple(_words(spec)), frozenset(_types(spec)))
        if inner is not None:
            below = path + (".*." if kind == "sections" else ".")
            yield from _keys(definitions[inner.rpartition("/")[2]], definitions, below)


def _kind(spec: dict[str, Any]) -> tuple[Kind, str | None]:
    """The kind of a key and, for sections, the reference to their definition."""
    if "$ref" in spec:
        return "section", spec["$ref"]
    if "$ref" in spec.get("items", {}):
        return "sections", spec["items"]["$ref"]
    if any(choice.get("type") == "object" for choice in spec.get("anyOf", [spec])):
        return "mapping", None
    return "value", None


def _words(spec: dict[str, Any]) -> list[str]:
    """Words that may stand for the value, or for its entries."""
    nested = [*spec.get("anyOf", []), *([spec["items"]] if "items" in spec else [])]
    own = spec.get("enum", [spec["const"]] if "const" in spec else [])
    return [*own, *(word for inner in nested for word in _words(inner))]


def _types(spec: dict[str, Any]) -> set[str]:
    nested = [*spec.get("anyOf", []), *spec.get("prefixItems", [])]
    for inner in ("items", "additionalProperties"):
        if isinstance(spec.get(inner), dict):
            nested.append(spec[inner])
    own = {spec["type"]} if spec.get("type") not in (None, "array", "object") else set()
    return own.union(*(_types(inner) for inner in nested))


def describe(spec: dict[str, Any]) -> str:
    """A JSON Schema fragment in words: "a number >= 0 and < 1"."""
    if "anyOf" in spec:
        return ", or ".join(describe(choice) for choice in spec["anyOf"])
    if "enum" in spec or "const" in spec:
        return " | ".join(_words(spec))
    if "prefixItems" in spec:
        return f"a list of {len(spec['prefixItems'])}: " + ", ".join(describe(item) for item in spec["prefixItems"])
    if "items" in spec:
        least = " (one or more)" if spec.get("minItems") else ""
        return f"a list{least}, each entry {describe(spec['items'])}"
    nouns = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    noun = nouns.get(spec.get("type", "object"), "null" if spec.get("type") == "null" else "a mapping")
    return noun + _bounds(spec)


def _bounds(spec: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {spec[name]:g}" for name, sign in signs.items() if name in spec]
    pattern = f" like {spec['pattern']}" if "pattern" in spec else ""
    return pattern + (" " + " and ".join(limits) if limits else "")


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
