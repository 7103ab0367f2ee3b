"""How much one rendering of a chat template may do, counted and not timed: the same on every machine.

    BUDGET.start()                 before each rendering
    BUDGET.step(), .keep()         work, and memory; every loop, call and filter says what it takes
    count(value), measure(value)   what an operation on `value` takes, before it begins
    check_*                        what cannot be interrupted once it has begun: `'a' * 10**9`, `9 ** 9 ** 9`

Jinja's sandbox keeps a template from Python's internals but not from work: nested loops run for hours, and doubling a
string thirty times fills the memory. Real templates need some thousand steps.

Memory is counted when something is made and not given back when it is dropped: what is alive at any time is less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

MAX_STEPS = 5_000_000  # about two seconds
CALL = 10  # steps that a call takes as long as
PIECE = 4
MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_TEXT_CHARACTERS = 8 << 20  # of any one string
MAX_BYTES = 320 << 20  # of all strings and lists, together
MAX_ITEMS = 1_000_000  # of any one list
MAX_NUMBER = 10**18  # of a result of `**`
MAX_BITS = 1 << 14  # of any one integer: longer than any that Python prints
SHORT_CHARACTERS = 64
SHORT_BYTES = 400  # a string of up to so many characters with its shadow, at the most
POINTER_BYTES, ITEM_BYTES = 8, 100  # an item of a copied list; one that is made as well
_WIDE = re.compile(r"\d{7}")
_WIDTHS = re.compile(r"[%{][^%{}a-zA-Z]*?(\d+)")
_CHARACTERS_A_STEP = 64
_EMPTY: dict[Any, Any] = {}
_GROUPS = (set, frozenset, type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items()))


class TooExpensive(jinja2.TemplateError):
    """The template does more than any chat template has to."""


class Budget:
    """What is left for the rendering under way."""

    __slots__ = ("bytes", "steps")

    def __init__(self) -> None:
        self.steps, self.bytes = MAX_STEPS, MAX_BYTES

    def start(self) -> None:
        self.steps, self.bytes = MAX_STEPS, MAX_BYTES

    def step(self, num: int = 1) -> None:
        """Work that takes as long as so many turns of an empty loop."""
        self.steps -= num
        if self.steps < 0:
            raise TooExpensive(f"it takes more than {MAX_STEPS:,} steps")

    def keep(self, num_bytes: int) -> None:
        """So much memory."""
        self.bytes -= num_bytes
        if self.bytes < 0:
            raise TooExpensive(f"it makes texts and lists of more than {MAX_BYTES >> 20} MiB in all")

    def take(self, text: str, origin: str) -> None:
        """A string of more than `SHORT_CHARACTERS` with its shadow."""
        check_characters(str.__len__(text))
        self.keep(str.__sizeof__(text) + str.__sizeof__(origin))

    def copy(self, num_items: int) -> None:
        """A list of so many items that are there already."""
        self.step(num_items >> 4)
        self.keep(num_items * POINTER_BYTES)

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, each of which is made when it is asked for."""
        for item in items:
            self.step(2)
            if type(item) is list:
                self.copy(len(item))
            yield item


BUDGET = Budget()


class Measure(NamedTuple):
    """How much stands in a value, at every depth."""

    items: int
    characters: int  # of its text, about
    depth: int


_NOTHING = Measure(1, 0, 0)


def count(value: Any) -> None:
    """Count what stands in `value`, of which each item is a step: whatever then looks at it looks at no more."""
    if isinstance(value, str):
        if str.__len__(value) > SHORT_CHARACTERS:
            BUDGET.step(str.__len__(value) // _CHARACTERS_A_STEP)
    elif (inside := _inside(value)) is not None:
        _measure_items(inside)


def measure(value: Any) -> Measure:
    """`count`, and what was counted."""
    if isinstance(value, str):
        count(value)
        return Measure(1, str.__len__(value), 0)
    if isinstance(value, int):
        return Measure(1, value.bit_length() // 3 + 1, 0)
    inside = _inside(value)
    return _NOTHING if inside is None else _measure_items(inside)


def _measure_items(level: Sequence[Any]) -> Measure:
    items = characters = depth = 0
    BUDGET.step(len(level))
    while level:
        items, depth = items + len(level), depth + 1
        if isinstance(level, range):
            return Measure(items, 8 * items, depth)
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                characters += str.__len__(item) + 4
            elif isinstance(item, int):
                characters += item.bit_length() // 3 + 4
            elif (inside := _inside(item)) is not None:
                BUDGET.step(len(inside))
                characters += 4
                deeper.extend(inside)
            else:
                characters += 24
        level = deeper
    BUDGET.step(characters // _CHARACTERS_A_STEP)
    return Measure(items, characters, depth)


def _inside(value: Any) -> Sequence[Any] | None:
    """What stands directly in a value; None where nothing does. What is lazy counts when it is asked for."""
    if isinstance(value, (list, tuple, range)):
        return value
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, _GROUPS):
        return list(value)
    if isinstance(value, jinja2.utils.Namespace):
        return [object.__getattribute__(value, "_Namespace__attrs")]
    return None


def made(result: Any) -> Any:
    """What a call or filter returned, counted; what is lazy will be counted item by item."""
    if isinstance(result, str):
        BUDGET.keep(str.__sizeof__(result))
    elif isinstance(result, (list, tuple, dict)):
        BUDGET.keep(len(result) * ITEM_BYTES)
        BUDGET.step(len(result))
    elif isinstance(result, int):
        check_bits(result.bit_length())
    elif isinstance(result, (bytes, bytearray)):
        raise TooExpensive("it makes bytes, which are not counted")
    elif isinstance(result, (GeneratorType, map, zip, type(reversed([])))):
        return BUDGET.counted(result)
    return result


def check_characters(size: int) -> None:
    """Refuse a text of more characters than one may have."""
    if size > MAX_TEXT_CHARACTERS:
        raise TooExpensive(f"it makes a text of {size:,} characters, at most {MAX_TEXT_CHARACTERS:,}")


def check_bits(size: int) -> None:
    if size > MAX_BITS:
        raise TooExpensive(f"it computes a number of {size:,} bits, at most {MAX_BITS:,}")


def check_binary(operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` when its result would be too large to begin with; a list is counted."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "**" and _bits_of_power(left, right) >= MAX_NUMBER.bit_length():
            raise TooExpensive(f"it computes {left} ** {right}")
        check_bits(left.bit_length() + right.bit_length() if operator == "*" else left.bit_length())
    elif operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(many, (str, list, tuple)):
                _check_size(many, _length(many) * times)
    elif operator == "+":
        for kind in (str, list, tuple):
            if isinstance(left, kind) and isinstance(right, kind):
                _check_size(left, _length(left) + _length(right))


def check_printed(value: Any) -> Any:
    """`value`, whose text is not too long."""
    check_characters(measure(value).characters)
    return value


def check_arguments(values: Iterable[Any]) -> None:
    """Refuse a width or a count that no chat template has use for."""
    for value in values:
        if type(value) is int and abs(value) > MAX_ITEMS:
            raise TooExpensive(f"it asks for {value}, at most {MAX_ITEMS:,}")


def check_form(form: str, values: Iterable[Any]) -> None:
    """Refuse a format that asks for wide fields, such as `%9999999d`, or fills in more than one text may hold."""
    if _WIDE.search(form):
        raise TooExpensive(f"it asks for a field of millions of characters: {form[:40]!r}")
    num_fields = form.count("%") + form.count("{")
    longest = max([str.__len__(v) if isinstance(v, str) else measure(v).characters for v in values], default=0)
    check_characters(num_fields * longest + sum(map(int, _WIDTHS.findall(form))))
    if "*" in form and re.search(r"%[^%a-zA-Z]*\*", form):
        raise TooExpensive(f"it asks for a field as wide as a number says: {form[:40]!r}")


def check_parts(parts: Sequence[str], separator: str = "") -> None:
    """Refuse to join `parts` to a text that is too long."""
    size = sum(map(str.__len__, parts))
    if size > SHORT_CHARACTERS or separator:
        check_characters(size + str.__len__(separator) * len(parts))


def check_replace(text: str, old: Any, new: Any, *count: Any) -> None:
    """Refuse a `replace` that makes the text too long."""
    added = max(0, len(str(new)) - len(str(old)))
    if added * (len(text) + 1) > MAX_TEXT_CHARACTERS:
        check_characters(len(text) + added * str.count(text, str(old)))


def _check_expand(text: str, size: Any = 8) -> None:
    if isinstance(size, int):
        check_characters(len(text) + size * str.count(text, "\t"))


def _check_translate(text: str, table: Any) -> None:
    if isinstance(table, Mapping):
        longest = max((len(one) for one in table.values() if isinstance(one, str)), default=1)
        check_characters(len(text) * longest)


def _check_join(text: str, parts: Any) -> None:
    """Traced texts look at what they join themselves; `Markup` does not."""
    if isinstance(parts, (list, tuple)):
        check_parts([part for part in parts if isinstance(part, str)], text)
    elif isinstance(parts, Iterator) and isinstance(text, Markup):
        raise TooExpensive("it joins to a safe text what is not counted")


_GROWING: dict[str, Callable[..., None]] = {
    "replace": check_replace,
    "expandtabs": _check_expand,
    "translate": _check_translate,
    "join": _check_join,
}


def check_method(text: str, name: str, args: Sequence[Any]) -> None:
    """Count what a method of a text looks at; refuse one whose result would be too long."""
    count(text)
    if name in _GROWING:
        _GROWING[name](text, *args)


def _bits_of_power(base: int, exponent: int) -> int:
    return base.bit_length() * exponent


def _length(many: Any) -> int:
    return str.__len__(many) if isinstance(many, str) else len(many)


def _check_size(many: Any, size: int) -> None:
    allowed = MAX_TEXT_CHARACTERS if isinstance(many, str) else MAX_ITEMS
    if size > allowed:
        raise TooExpensive(f"it makes a {type(many).__name__.lower()} of {size:,}, at most {allowed:,}")
    if not isinstance(many, str):
        BUDGET.copy(max(size, 0))
    elif size >= SHORT_CHARACTERS:
        BUDGET.step(size // _CHARACTERS_A_STEP)
