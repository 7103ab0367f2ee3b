"""How much one rendering of a chat template may do, counted and not timed: the same on every machine.

    BUDGET.start()             before each rendering
    BUDGET.step()              each turn of a loop; `CALL` for each call
    BUDGET.take(len(text))     each string that is made

Jinja's sandbox keeps a template from Python's internals but not from work: nested loops run for hours, and doubling a
string thirty times fills the memory. Real templates need some thousand steps. What cannot be interrupted once it has
begun (`'a' * 10**9`, `9 ** 9 ** 9`, `'%999999999d'`) is refused before by `check_*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2

MAX_STEPS = 5_000_000  # about two seconds
CALL = 10  # steps that a call takes as long as
PIECE = 2
MAX_TEXT_CHARACTERS = 8 << 20  # of any one string
MAX_CHARACTERS = 256 << 20  # of all strings that count, together
MAX_ITEMS = 1_000_000  # of any one list
MAX_NUMBER = 10**18  # of a result of `**`
_COUNTED_FROM = 256  # shorter strings cost no more than the steps that make them
_WIDE = re.compile(r"\d{7}")


class TooExpensive(jinja2.TemplateError):
    """The template does more than any chat template has to."""


class Budget:
    """What is left for the rendering under way."""

    def __init__(self) -> None:
        self._steps, self._characters = MAX_STEPS, MAX_CHARACTERS

    def start(self) -> None:
        self._steps, self._characters = MAX_STEPS, MAX_CHARACTERS

    def step(self, num: int = 1) -> None:
        """So many turns of a loop; a call and a piece of a text that is cut up cost several."""
        self._steps -= num
        if self._steps < 0:
            raise TooExpensive(f"it takes more than {MAX_STEPS:,} steps")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, each of which is a step."""
        for item in items:
            self.step()
            yield item

    def take(self, num_characters: int) -> None:
        """A string of so many characters."""
        if num_characters < _COUNTED_FROM:
            return
        self._characters -= num_characters
        if num_characters > MAX_TEXT_CHARACTERS or self._characters < 0:
            limits = f"{MAX_TEXT_CHARACTERS:,} characters, or more than {MAX_CHARACTERS:,} in all"
            raise TooExpensive(f"it makes a text of more than {limits}")


BUDGET = Budget()


def check_binary(operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` when its result would be too large to begin with."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(many, (str, list, tuple)):
                _check_size(many, len(many) * times)
    elif operator == "+" and isinstance(left, list) and isinstance(right, list):
        _check_size(left, len(left) + len(right))
    elif operator == "**" and _bits_of_power(left, right) >= MAX_NUMBER.bit_length():
        raise TooExpensive(f"it computes {left} ** {right}")


def check_arguments(values: Iterable[Any]) -> None:
    """Refuse a width or a count that no chat template has use for."""
    for value in values:
        if type(value) is int and abs(value) > MAX_ITEMS:
            raise TooExpensive(f"it asks for {value}, at most {MAX_ITEMS:,}")


def check_form(form: str) -> None:
    """Refuse a format such as `%9999999d` or `{:>9999999}`."""
    if _WIDE.search(form):
        raise TooExpensive(f"it asks for a field of millions of characters: {form[:40]!r}")


def _bits_of_power(base: Any, exponent: Any) -> int:
    return base.bit_length() * exponent if isinstance(base, int) and isinstance(exponent, int) else 0


def _check_size(many: Any, size: int) -> None:
    allowed = MAX_TEXT_CHARACTERS if isinstance(many, str) else MAX_ITEMS
    if size > allowed:
        raise TooExpensive(f"it makes a {type(many).__name__.lower()} of {size:,}, at most {allowed:,}")
