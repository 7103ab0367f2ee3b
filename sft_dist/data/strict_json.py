"""JSON without the liberties: NaN, duplicate keys, NUL, lone surrogates, bytes that are not UTF-8, endless nesting.

Python's reader lets them through, and each turns into damage far away (a tokenizer that refuses the string, a field
that silently won over its namesake).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 64  # no data set needs more, and what walks over a value later may call itself at each level

_NOT_SPACE = re.compile(r"[^ \t\n\r]|\Z")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def skip_space(text: str, at: int) -> int:
    """The next position that is not JSON white space, or the end."""
    match = _NOT_SPACE.search(text, at)
    assert match is not None, "the end of the text always matches"
    return match.start()


def loads(text: str) -> Any:
    """The one JSON value of `text`; raises ValueError with the reason."""
    return StrictJson().only_value(text)


class StrictJson:
    """Reads values and tells their flaws. Text decoded with `surrogateescape` shows the bytes that are not UTF-8."""

    def __init__(self) -> None:
        self._flaws: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._pairs, parse_constant=self._constant, parse_float=self._float
        )

    def object(self, raw: bytes) -> dict[str, Any]:
        """The one object on a line; raises ValueError with the reason."""
        try:
            value = self.only_value(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8") from None
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {kind_of(value)}")
        return value

    def only_value(self, text: str) -> Any:
        """The value that is the whole text; raises ValueError with the reason."""
        value, end, flaw = self.value_at(text, skip_space(text, 0))
        if flaw or skip_space(text, end) != len(text):
            raise ValueError(flaw or f"something follows the JSON value at column {end + 1}")
        return value

    def value_at(self, text: str, at: int) -> tuple[Any, int, str]:
        """(value, end, flaw or ""); raises ValueError when the JSON is broken."""
        self._flaws.clear()
        try:
            value, end = self._decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(_explained(error)) from None
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        except ValueError as error:  # Python's guard against numbers that take minutes to read
            raise ValueError("a number of thousands of digits") from error
        return value, end, self._flaw(value, text, at, end)

    def _flaw(self, value: Any, text: str, at: int, end: int) -> str:
        if self._flaws:
            return self._flaws[0]
        if text.count("[", at, end) + text.count("{", at, end) > MAX_DEPTH and _is_deeper(value):
            return f"JSON nested deeper than {MAX_DEPTH} levels"
        if not text.isascii() and (broken := _NOT_UTF8.search(text, at, end)):
            return _not_utf8(broken[0])
        if _SUSPECT.search(text, at, end):
            for string in texts_of(value):
                if found := _UNUSABLE.search(string):
                    return _unusable(found[0])
        return ""

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._flaws.append(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return found

    def _constant(self, name: str) -> float:
        self._flaws.append(f"{name} is not JSON")
        return 0.0

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._flaws.append(f"number {digits[:24]} is out of range")
        return value


def _is_deeper(value: Any) -> bool:
    """Whether arrays and objects stand in each other more than `MAX_DEPTH` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        containers = (held.values() if isinstance(held, dict) else held for held in level)
        level = [item for items in containers for item in items if isinstance(item, dict | list)]
    return bool(level)


def text_flaw(text: str) -> str:
    """What makes a text that was decoded with `surrogateescape` unusable, or ""."""
    if text.isascii():
        return _unusable("\0") if "\0" in text else ""
    found = _NOT_UTF8.search(text)
    if found:
        return _not_utf8(found[0])
    found = _UNUSABLE.search(text)
    return _unusable(found[0]) if found else ""


def _not_utf8(escaped: str) -> str:
    return f"byte 0x{ord(escaped) - 0xDC00:02x} is not UTF-8"


def _unusable(character: str) -> str:
    return "NUL character in a string" if character == "\0" else f"lone surrogate U+{ord(character):04X}"


def _explained(error: json.JSONDecodeError) -> str:
    ends = " (the text ends here: truncated?)" if error.pos >= len(error.doc.rstrip()) else ""
    line = f"line {error.lineno} " if error.lineno > 1 else ""
    return f"invalid JSON at {line}column {error.colno}: {error.msg}{ends}"


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for messages."""
    names = {dict: "an object", list: "an array", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def texts_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
