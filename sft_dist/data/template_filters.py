"""What the filters and tests of a template go through, and which are refused before they begin.

A filter that is not named here looks once at everything that stands in its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft_dist.data.render_budget import (
    BUDGET,
    ITEM_BYTES,
    TooExpensive,
    check_bits,
    check_characters,
    check_replace,
    measure,
)

# Their work does not depend on what they are given.
FREE = frozenset(["length", "count", "default", "d", "first", "last", "items", "attr"])
FREE_TESTS = frozenset(
    ["defined", "undefined", "none", "string", "mapping", "number", "integer", "float", "boolean", "true", "false",
     "callable", "sequence", "iterable", "sameas", "escaped", "filter", "test"]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """What a filter takes beside one look at its arguments, in steps."""

    an_item: int = 0
    a_character: float = 0
    is_shallow: bool = False  # items pass as they are; they are counted one by one where they are made
    is_quadratic: bool = False  # in characters

    def count(self, value: Any) -> None:
        """Before the filter looks at `value`."""
        if self.is_shallow and not isinstance(value, str):
            BUDGET.step(len(value) >> 3 if hasattr(value, "__len__") else 0)
            return
        found = measure(value)
        if not isinstance(value, str):
            check_characters(found.characters)
        extra = self.an_item * found.items + int(self.a_character * found.characters)
        if self.is_quadratic:
            extra += found.characters**2 >> 14
        if extra:
            BUDGET.step(extra)


_LAZY = ("list", "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice", "reverse")
_ORDER = ("sort", "groupby", "unique", "dictsort", "min", "max", "sum")
COSTS: dict[str, Cost] = {
    **dict.fromkeys(_LAZY, Cost(is_shallow=True)),
    **dict.fromkeys(_ORDER, Cost(an_item=8, a_character=0.25)),
    **dict.fromkeys(("striptags", "urlize", "wordwrap"), Cost(an_item=1, a_character=1, is_quadratic=True)),
    "pprint": Cost(an_item=60, a_character=1, is_quadratic=True),
    "title": Cost(a_character=1),
    "urlencode": Cost(a_character=1),
    "wordcount": Cost(a_character=0.25),
    "xmlattr": Cost(an_item=8, a_character=0.25),
    "tojson": Cost(an_item=4, a_character=0.125),
}


def _check_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, *_: Any, **__: Any
) -> None:
    """Each item on a line of its own behind as many indentations as it is deep."""
    found = measure(value)
    width = indent if isinstance(indent, int) else len(indent or "")
    beside = max(map(len, separators)) if separators else 2
    check_characters(found.characters + found.items * (width * (found.depth + 1) + beside))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    if isinstance(text, str):
        check_characters(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))


def _check_round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(precision, int) and abs(precision) > 308:
        raise TooExpensive(f"it rounds to {precision} digits")


def _check_int(value: Any, *_: Any, **__: Any) -> None:
    """Python limits decimal numbers by itself."""
    if isinstance(value, str):
        check_bits(3 * len(value))


def _check_replace(context: Any, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    if isinstance(text, str):
        check_replace(text, old, new)


def _check_slices(value: Any, slices: Any = 0, *_: Any, **__: Any) -> None:
    if isinstance(slices, int):
        BUDGET.step(max(slices, 0))
        BUDGET.keep(max(slices, 0) * ITEM_BYTES)


def _check_batch(value: Any, linecount: Any = 0, fill_with: Any = None) -> None:
    if isinstance(linecount, int) and fill_with is not None:
        BUDGET.copy(2 * max(linecount, 0))


CHECKS: dict[str, Callable[..., None]] = {
    "tojson": _check_json,
    "indent": _check_indent,
    "round": _check_round,
    "int": _check_int,
    "replace": _check_replace,
    "slice": _check_slices,
    "batch": _check_batch,
}
