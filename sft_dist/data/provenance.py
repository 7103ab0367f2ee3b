"""Text that remembers where each of its characters came from.

A `Traced` string is an ordinary `str` with a shadow: a second string of the same length whose n-th letter names the
origin of the n-th character. Whatever a chat template does to the text (add, slice, strip, split, replace, join)
happens to the shadow too, so after rendering, the shadow tells which message every character belongs to. No
generation tags, no second rendering, no search for the answer in the output.

    text     <|user|>Hi<|end|><|assistant|>Hello<|end|>
    shadow   lllllllluullllllllllllllllllllaaaaallllllll       l literal, u message 0, a message 1

A letter packs (message, slot, tagged): `ord(letter) = tagged << 19 | (message + 1) << 6 | slot`. What cannot be
followed character by character (JSON escaping, a length-changing upper-casing) belongs as a whole to its only
origin. What has no single origin becomes UNKNOWN, and the caller reports it: an origin is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from sft_dist.data.render_budget import (
    BUDGET,
    PIECE,
    SHORT_BYTES,
    SHORT_CHARACTERS,
    check_parts,
    check_replace,
)

UNKNOWN, LITERAL, TOOLS = "\x00", "\x01", "\x02"  # letters that belong to no message
MAX_MESSAGES = (1 << 13) - 2
_SLOT_BITS, TAGGED = 6, 1 << 19

# Slots: which part of a message. Names of called functions start at NAMES, one slot for each call: some templates
# repeat them in the header of the tool's answer, and a name seen a second time is no longer the assistant speaking.
ROLE, CONTENT, REASONING, HEADER, ARGUMENTS, NAMES = range(6)
MAX_SLOT = (1 << _SLOT_BITS) - 1


def letter(message: int, slot: int) -> str:
    """The shadow letter of `slot` of message number `message` (0-based)."""
    return chr((message + 1) << _SLOT_BITS | min(slot, MAX_SLOT))


class Traced(str):
    """A string whose characters know their origin. Compares, hashes and prints like the plain string."""

    __slots__ = ("_origin",)
    _origin: str

    def __new__(cls, text: str = "", origin: str | None = None) -> Traced:
        size = len(text)  # refused by an opaque text, which must not become a transparent one
        self = str.__new__(cls, text)
        self._origin = origin_of(text) if origin is None else origin
        BUDGET.bytes -= SHORT_BYTES
        if size > SHORT_CHARACTERS or BUDGET.bytes < 0:
            BUDGET.take(self, self._origin)
        return self

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return derive(str.__format__(self, spec), self) if spec else self

    def __add__(self, other: Any) -> Traced:
        if not isinstance(other, str):
            return NotImplemented  # Jinja's undefined then names itself
        return Traced(str.__add__(self, other), self._origin + origin_of(other))

    def __radd__(self, other: Any) -> Traced:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(other, self), origin_of(other) + self._origin)

    def __mul__(self, times: SupportsIndex) -> Traced:
        return Traced(str.__mul__(self, times), self._origin * times)

    __rmul__ = __mul__

    def __getitem__(self, index: SupportsIndex | slice) -> Traced:
        return Traced(str.__getitem__(self, index), self._origin[index])

    def __iter__(self) -> Iterator[str]:
        return map(Traced, str.__iter__(self), self._origin)

    def join(self, parts: Iterable[str]) -> Traced:
        parts = list(parts)
        check_parts(parts, self)
        return _joined(str.join(self, parts), self._origin.join(map(origin_of, parts)), parts)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Traced:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Traced:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Traced:
        if not old:
            check_replace(self, old, new)
            return derive(str.replace(self, old, new, count), self, new)
        return Traced(new).join(self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._pieces(str.splitlines(self, True), "")
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str) -> tuple[str, str, str]:
        head, found, tail = self._pieces(str.partition(self, sep), "")
        return head, found, tail

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        head, found, tail = self._pieces(str.rpartition(self, sep), "")
        return head, found, tail

    def _pieces(self, parts: Iterable[str], sep: str | None) -> list[str]:
        """`parts`, cut from self from left to right with `sep` between two of them, with their shadows."""
        parts = list(parts)
        BUDGET.step(PIECE * len(parts))
        pieces: list[str] = []
        at = 0
        for part in parts:
            if sep is None:  # any white space, with which no part begins: the next place that fits is the place
                at = str.find(self, part, at)
            pieces.append(self[at : at + len(part)])
            at += len(part) + len(sep or "")
        return pieces


def _followed(name: str) -> Any:
    """The `str` method `name`, keeping the shadow when each character became one character."""
    plain = getattr(str, name)

    def method(self: Traced, *args: Any) -> Traced:
        return same_length(plain(self, *args), self)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


for _name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper"):
    setattr(Traced, _name, _followed(_name))


def _derived(name: str) -> Any:
    plain = getattr(str, name)

    def method(self: Traced, *args: Any) -> Traced:
        return derive(plain(self, *args), self, *args)

    method.__name__, method.__doc__ = name, plain.__doc__
    return method


for _name in ("center", "expandtabs", "ljust", "rjust", "translate", "zfill"):
    setattr(Traced, _name, _derived(_name))


def origin_of(text: str) -> str:
    """The shadow of any string: UNKNOWN letters for one that is not traced."""
    return text._origin if isinstance(text, Traced) else UNKNOWN * len(text)


def literal(text: str) -> Traced:
    """A piece of the template itself."""
    return Traced(text, LITERAL * len(text))


def concat(parts: Iterable[str]) -> Traced:
    """All parts in one; plain parts become UNKNOWN."""
    parts = list(parts)
    check_parts(parts)
    return _joined("".join(parts), "".join(map(origin_of, parts)), parts)


def _joined(text: str, origin: str, parts: Iterable[str]) -> Traced:
    """`text` made of `parts`, opaque when one of them is."""
    return Opaque(text, origin) if Opaque in map(type, parts) else Traced(text, origin)


def same_length(text: str, source: Traced) -> Traced:
    """`text` computed from `source` character by character, if the lengths agree; else derived as a whole."""
    return Traced(text, source._origin) if len(text) == len(source) else derive(text, source)


def derive(text: str, *sources: Any, data: bool = False) -> Traced:
    """`text` computed from `sources` in a way that cannot be followed: owned as a whole, or UNKNOWN.

    Owned when every source character has one and the same message. `data=True` (JSON): literals beside it, such as
    keys, do not matter. Sources may be nested lists and mappings.
    """
    if WATCH.on and holds_opaque(sources):
        raise Looked
    letters = set("".join(origin_of(leaf) for leaf in _strings(sources)))
    owned = letters - {LITERAL}
    messages = {ord(one) >> _SLOT_BITS for one in owned}
    if not owned:
        origin = LITERAL
    elif UNKNOWN in owned or len(messages) > 1 or (LITERAL in letters and not data):
        origin = UNKNOWN
    else:
        origin = min(owned)
    return Traced(text, origin * len(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def trace(value: Any, origin: str) -> Any:
    """`value` with every string in it (keys too) owned by `origin`; other JSON values unchanged."""
    if isinstance(value, str):
        return Traced(value, origin * len(value))
    if isinstance(value, Mapping):
        return {trace(key, origin): trace(item, origin) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [trace(item, origin) for item in value]
    return value


def tag(text: str) -> Traced:
    """`text` marked as lying inside a template's generation tags."""
    letters = np.frombuffer(origin_of(text).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return _joined(text, (letters | TAGGED).tobytes().decode("utf-32-le", "surrogatepass"), [text])


class Looked(BaseException):
    """A template asked an opaque text what it says. No `Exception`: nothing inside a template may catch it."""


class Watch:
    """What templates ask of opaque texts while one is rendered with them."""

    def __init__(self) -> None:
        self.on = False
        self.conditions: list[tuple[int, int, str, str]] = []  # (message, operation, question, what) answered with no


WATCH = Watch()
OPERATIONS: tuple[tuple[str, str | None], ...] = (
    ("strip", None), ("lstrip", None), ("rstrip", None), ("strip", "\n"), ("lstrip", "\n"), ("rstrip", "\n")
)  # fmt: skip
FIRST_OPERATION = MAX_SLOT - len(OPERATIONS)  # slots of contents that went through one of them


class Opaque(Traced):
    """A text, or what was made of one, that goes where the template puts it, whatever it says.

    It can be joined to others, stripped at its ends, and asked whether it holds, begins or ends with a given text or
    equals it: the answer is no, and the question is noted. It is never empty. Anything else raises `Looked`: a
    rendering that comes to an end did the same for any text to which all noted questions have that answer.
    """

    __slots__ = ("_part",)
    _part: tuple[int, int] | None  # (message, slot) of a whole content

    def __new__(cls, text: str, origin: str, part: tuple[int, int] | None = None) -> Opaque:
        self = str.__new__(cls, text)
        self._origin, self._part = origin, part
        return self

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Any) -> Traced:
        return concat([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Traced:
        return concat([other, self]) if isinstance(other, str) else NotImplemented

    def __contains__(self, what: object) -> bool:
        return self._ask("__contains__", what)

    def __eq__(self, other: object) -> bool:
        return other is self or self._ask("__eq__", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def startswith(self, prefix: Any, *args: Any) -> bool:
        return self._ask("startswith", prefix, *args)

    def endswith(self, suffix: Any, *args: Any) -> bool:
        return self._ask("endswith", suffix, *args)

    def strip(self, chars: str | None = None) -> Traced:
        return self._cut("strip", chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self._cut("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> Traced:
        return self._cut("rstrip", chars)

    def _ask(self, question: str, what: object, *args: Any) -> bool:
        if args or self._part is None or not isinstance(what, str) or isinstance(what, Opaque) or not what:
            raise Looked
        WATCH.conditions.append((*self._part, question, str.__str__(what)))
        return False

    def _cut(self, name: str, chars: str | None) -> Traced:
        if self._part is not None and self._part[1] == FIRST_OPERATION and chars is None:
            return self  # stripped of all white space already
        if self._part is None or self._part[1] != CONTENT or (name, chars) not in OPERATIONS:
            raise Looked
        slot = FIRST_OPERATION + OPERATIONS.index((name, chars))
        return Opaque(str.__str__(self), letter(self._part[0], slot) * str.__len__(self), (self._part[0], slot))


def holds_opaque(value: Any) -> bool:
    """Whether an opaque text stands anywhere in `value`."""
    if isinstance(value, Mapping):
        return any(map(holds_opaque, value.keys())) or any(map(holds_opaque, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(holds_opaque, value))
    return type(value) is Opaque


def opaque_text(text: str) -> str:
    """What an opaque text says: for those who do not render."""
    return str.__str__(text)[:] if type(text) is not Opaque else "".join(["", text])


def unlooked(value: Any) -> Any:
    """`value`, which may not be opaque."""
    if type(value) is Opaque:
        raise Looked
    return value


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise Looked


_HARMLESS = {"__new__", "__init__", "__init_subclass__", "__subclasshook__", "__class__", "__doc__", "__getattribute__",
             "__setattr__", "__delattr__"}  # fmt: skip
for _name in {*dir(str), *vars(Traced)} - _HARMLESS - set(vars(Opaque)):
    if callable(getattr(Traced, _name)):
        setattr(Opaque, _name, _refuse)
Opaque.__hash__ = _refuse  # type: ignore[method-assign]


class Run(NamedTuple):
    """Neighbouring characters [start, end) of one origin. `message` is -1 for literals, unknowns and tools."""

    start: int
    end: int
    message: int
    slot: int  # for message -1: the number of UNKNOWN, LITERAL or TOOLS
    tagged: bool

    @property
    def is_literal(self) -> bool:
        return self.message < 0 and self.slot == ord(LITERAL)

    @property
    def is_unknown(self) -> bool:
        return self.message < 0 and self.slot == ord(UNKNOWN)


_RUN = re.compile(r"(.)\1*", re.DOTALL)


def runs(text: str) -> list[Run]:
    """The whole text as maximal runs, in order."""
    found = []
    for match in _RUN.finditer(origin_of(text)):
        message, slot, tagged = _named(match[1])
        found.append(Run(*match.span(), message, slot, tagged))
    return found


@lru_cache(maxsize=1024)
def _named(letter: str) -> tuple[int, int, bool]:
    """(message, slot, tagged)."""
    code = ord(letter)
    return ((code & (TAGGED - 1)) >> _SLOT_BITS) - 1, code & MAX_SLOT, code >= TAGGED
