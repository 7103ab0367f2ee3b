"""Traced strings: text as `str` computes it, origin as each character brought it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.provenance import (
    CONTENT,
    LITERAL,
    ROLE,
    UNKNOWN,
    Run,
    Traced,
    concat,
    derive,
    letter,
    literal,
    origin_of,
    runs,
    tag,
    trace,
)

FIRST = 0x1000  # shadow letters of these tests: one for each character of the source


def numbered(text: str, start: int = 0) -> Traced:
    """`text` with a letter of its own on every character."""
    return Traced(text, "".join(chr(FIRST + start + i) for i in range(len(text))))


def sources(traced: str, text: str) -> list[int]:
    """Which character of `text` each character of `traced` is; checks that it is that character."""
    found = [ord(one) - FIRST for one in origin_of(traced)]
    assert [text[i] for i in found] == list(str.__str__(traced))
    return found


TEXTS = st.text(alphabet="ab \n\t.X漢é🎉", max_size=24)
CUTS = {
    "strip": lambda t: t.strip(),
    "lstrip": lambda t: t.lstrip(),
    "rstrip": lambda t: t.rstrip(),
    "strip-chars": lambda t: t.strip("ab"),
    "slice": lambda t: t[2:-1],
    "step": lambda t: t[::-2],
    "index": lambda t: t[0:1],
    "removeprefix": lambda t: t.removeprefix("a"),
    "removesuffix": lambda t: t.removesuffix("b"),
}
SPLITS = {
    "split": lambda t: t.split(),
    "split-once": lambda t: t.split(None, 1),
    "rsplit-once": lambda t: t.rsplit(None, 1),
    "split-sep": lambda t: t.split("ab"),
    "split-overlap": lambda t: t.split("aa"),
    "rsplit-overlap": lambda t: t.rsplit("aa", 1),
    "partition": lambda t: list(t.partition("b")),
    "rpartition": lambda t: list(t.rpartition("b")),
    "splitlines": lambda t: t.splitlines(),
    "splitlines-keep": lambda t: t.splitlines(True),
    "characters": list,
}


@pytest.mark.parametrize("name", CUTS)
@given(text=TEXTS)
def test_cut(name: str, text: str) -> None:
    cut = CUTS[name](numbered(text))
    assert type(cut) is Traced and cut == CUTS[name](text)
    found = sources(cut, text)
    assert found == sorted(found, reverse=name == "step")


@pytest.mark.parametrize("name", SPLITS)
@given(text=TEXTS)
def test_split(name: str, text: str) -> None:
    parts = SPLITS[name](numbered(text))
    assert parts == SPLITS[name](text)
    found = [i for part in parts for i in sources(part, text)]
    assert found == sorted(set(found)), "each character once, in order"


@given(text=TEXTS, old=st.sampled_from(["a", "ab", "aa", " ", "\n\n"]), new=st.sampled_from(["", "-", "long one"]))
def test_replace(text: str, old: str, new: str) -> None:
    for count in (-1, 1):
        replaced = numbered(text).replace(old, literal(new), count)
        assert replaced == text.replace(old, new, count)
        kept = [ord(one) - FIRST for one in origin_of(replaced) if one != LITERAL]
        assert kept == sorted(set(kept))
        assert "".join(text[i] for i in kept) == text.replace(old, "", count)


@given(left=TEXTS, right=TEXTS)
def test_added_on_either_side(left: str, right: str) -> None:
    mine, other = numbered(left), numbered(right, len(left))
    assert sources(mine + other, left + right) == list(range(len(left + right)))
    assert origin_of(left + other) == UNKNOWN * len(left) + origin_of(other)
    assert origin_of(mine + right) == origin_of(mine) + UNKNOWN * len(right)
    assert (left + other, mine + right) == (left + right, left + right)


def test_joined_and_repeated() -> None:
    joined = literal(", ").join([numbered("ab"), numbered("c", 2)])
    assert joined == "ab, c"
    assert origin_of(joined) == f"{chr(FIRST)}{chr(FIRST + 1)}{LITERAL}{LITERAL}{chr(FIRST + 2)}"
    assert origin_of(numbered("ab") * 2) == origin_of(numbered("ab")) * 2
    assert origin_of(concat([numbered("a"), "b"])) == chr(FIRST) + UNKNOWN


@pytest.mark.parametrize("name", ["upper", "lower", "title", "capitalize", "swapcase", "casefold"])
def test_case_keeps_the_origin_of_each_character(name: str) -> None:
    text = "hello World é"
    changed = getattr(numbered(text), name)()
    assert changed == getattr(text, name)()
    assert origin_of(changed) == origin_of(numbered(text))


def test_a_change_of_length_is_owned_as_a_whole() -> None:
    mine = letter(3, CONTENT)
    assert origin_of(trace("straße", mine).upper()) == mine * 7
    assert origin_of((literal("x") + trace("straße", mine)).upper()) == UNKNOWN * 8


def test_derived_from_two_messages_is_unknown() -> None:
    first, second = letter(0, CONTENT), letter(1, CONTENT)
    assert origin_of(derive("x", trace("a", first), trace("b", second))) == UNKNOWN
    assert origin_of(derive("x", trace("a", first), trace("b", letter(0, ROLE)))) == min(first, letter(0, ROLE))
    assert origin_of(derive("x", trace({"k": ["a"]}, first))) == first
    assert origin_of(derive("x", trace("a", first), "plain")) == UNKNOWN
    assert origin_of(derive("x", literal("a"))) == LITERAL


def test_it_is_a_string_to_everyone_else() -> None:
    traced = numbered("abc")
    assert traced == "abc" and traced == "abc" and hash(traced) == hash("abc")
    assert {"abc": 1}[traced] == 1 and "b" in traced and traced.startswith("a")
    assert traced < "abd" and len(traced) == 3 and json.dumps({traced: traced}) == '{"abc": "abc"}'
    assert str(traced) is traced, "str() must not strip the origin: Jinja calls it on every output"
    assert f"{traced:>5}" == "  abc"


def test_runs_tell_message_slot_and_tags() -> None:
    text = literal("<|") + trace("user", letter(0, ROLE)) + tag(literal("|>") + trace("Hi", letter(0, CONTENT))) + "?"
    assert runs(text) == [
        Run(0, 2, -1, ord(LITERAL), False),
        Run(2, 6, 0, ROLE, False),
        Run(6, 8, -1, ord(LITERAL), True),
        Run(8, 10, 0, CONTENT, True),
        Run(10, 11, -1, ord(UNKNOWN), False),
    ]


def test_letters_of_many_messages_do_not_collide() -> None:
    letters = {letter(message, slot) for message in range(8190) for slot in (ROLE, CONTENT, 63)}
    assert len(letters) == 3 * 8190
    assert max(map(ord, letters)) < 1 << 19
