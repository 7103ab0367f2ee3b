"""Recipe -> text: YAML that loads back equal, the same with the origin of each value, JSON Schema for editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sft_dist.config import keys
from sft_dist.config.schema import Recipe
from sft_dist.config.yaml12 import write_scalar, write_text

Line = tuple[str, str]  # (text, dotted key of the value on it; "" for a heading)


def dump_recipe(recipe: Recipe) -> str:
    """YAML text of every setting, defaults included; `load_recipe` of it gives an equal recipe."""
    return "".join(f"{text}\n" for text, _ in _lines(recipe.model_dump(), "", ""))


def annotate_recipe(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """The same text with the origin of each value as a comment; defaults carry none."""
    lines = list(_lines(recipe.model_dump(), "", ""))
    shown = {key for _, key in lines if origins.get(key, "default") != "default"}
    width = max((len(text) for text, key in lines if key in shown), default=0)
    notes = (f"{text:<{width}}  # {origins[key]}" if key in shown else text for text, key in lines)
    return "".join(f"{line}\n" for line in notes)


def settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting under its dotted key, list entries by index."""
    flat = _flat(recipe.model_dump(), "")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    kernels = schema["properties"]["kernels"]
    words = keys.index()["kernels.head"].words
    schema["properties"]["kernels"] = {"anyOf": [{"enum": list(words)}, {"$ref": kernels["$ref"]}], "default": "auto"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sft-dist recipe"}


def _flat(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        below = f"{path}{name}"
        key = keys.find(below)
        if key is not None and key.kind == "section":
            yield from _flat(value, f"{below}.")
        elif key is not None and key.kind == "sections" and value:
            for position, entry in enumerate(value):
                yield from _flat(entry, f"{below}.{position}.")
        else:
            yield below, value


def _lines(values: dict[str, Any], path: str, indent: str) -> Iterator[Line]:
    """Sections as blocks, lists of sections as `-` blocks, every other value in flow style on one line."""
    for name, value in values.items():
        below = f"{path}{name}"
        key = keys.find(below)
        if key is not None and key.kind == "section":
            yield f"{indent}{name}:", ""
            yield from _lines(value, f"{below}.", indent + "  ")
        elif key is not None and key.kind == "sections" and value:
            yield f"{indent}{name}:", ""
            for position, entry in enumerate(value):
                yield from _entry(entry, f"{below}.{position}.", indent + "  ")
        else:
            yield f"{indent}{name}: {_flow_text(value)}", below


def _entry(entry: dict[str, Any], path: str, indent: str) -> Iterator[Line]:
    mark = "- "
    for text, key in _lines(entry, path, ""):
        yield f"{indent}{mark}{text}", key
        mark = "  "


def _flow_text(value: Any) -> str:
    """One value as a single line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_text(name)}: {_flow_text(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow_text(inner) for inner in value) + "]"
    return write_scalar(value)
