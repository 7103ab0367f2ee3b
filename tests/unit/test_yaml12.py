"""Recipe text means what YAML 1.2 says, and what could surprise is refused with its line."""

from __future__ import annotations

import math

import pytest

from sft_dist.config.yaml12 import Branch, Items, Leaf, parse, parse_value, read_scalar
from sft_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("+7", 7),
        ("0", 0),
        ("65_536", 65_536),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("2024-01-31", "2024-01-31"),
        ("nan", "nan"),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_a_plain_word_has_its_core_schema_value(text: str, value: object) -> None:
    got = read_scalar(text)
    assert got == value and type(got) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read_scalar(".nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0123", "-08", "00", "0_7"])
def test_leading_zeros_are_refused_with_both_spellings(text: str) -> None:
    with pytest.raises(ConfigError, match=f'write {text.lstrip("-0_") or 0}, or "{text}"'):
        read_scalar(text)


def test_quoted_words_are_text() -> None:
    tree = parse("a: '1e-5'\nb: \"no\"\n", "r.yaml")
    assert [leaf.scalar() for leaf in tree.children.values() if isinstance(leaf, Leaf)] == ["1e-5", "no"]


def test_every_node_knows_its_line() -> None:
    tree = parse("a:\n  b:\n    - 1\n    - c: 2\n", "r.yaml")
    a = tree.children["a"]
    assert isinstance(a, Branch) and a.where == "r.yaml:1"
    b = a.children["b"]
    assert isinstance(b, Items) and b.where == "r.yaml:2" and b.children[0].where == "r.yaml:3"
    entry = b.children[1]
    assert isinstance(entry, Branch) and entry.children["c"].where == "r.yaml:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: duplicate key 'a': first written at r.yaml:1, keep one"),
        ("s:\n  a: 1\n  'a': 2\n", "r.yaml:3: duplicate key 'a'"),
        ("a: [1,\n", "r.yaml:2: not YAML"),
        ("a:\n\tb: 1\n", "r.yaml:2: not YAML"),
        ("a: 'x\n", "r.yaml:2: not YAML"),
        ("a: b: c\n", "r.yaml:1: not YAML"),
        ("a: \x01\n", "r.yaml: not YAML"),
        ("a: *nothing\n", r"r.yaml:1: \*nothing refers to nothing"),
        ("a: &x [*x]\n", r"r.yaml:1: \*x refers to nothing"),
        ("\na: !!python/object:os.system {}\n", "r.yaml:2: tags like"),
        ("a: !!str 1\n", "r.yaml:1: tags like"),
        ("b: &b {x: 1}\na:\n  <<: *b\n", "r.yaml:3: merge keys"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document"),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("[x, y]: 1\n", "r.yaml:1: a key must be one word"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper"),
    ],
)
def test_mistakes_name_their_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "r.yaml")


def test_aliases_are_expanded_within_bounds() -> None:
    tree = parse("a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert tree.children["c"] == tree.children["a"]
    bomb = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10) if i else '1'}]\n" for i in range(9))
    with pytest.raises(ConfigError, match="once aliases are expanded"):
        parse(bomb, "r.yaml")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_is_an_empty_recipe(text: str) -> None:
    assert parse(text, "r.yaml").children == {}


def test_command_line_values_are_words_unless_they_open_a_bracket_or_quote() -> None:
    where = "command line"
    assert parse_value("a: b #c", where) == Leaf("a: b #c", plain=True, where=where)
    assert parse_value("'007'", where) == Leaf("007", plain=False, where=where)
    assert isinstance(parse_value("[0.9, 0.95]", where), Items)
    assert isinstance(parse_value("{path: x}", where), Branch)
    with pytest.raises(ConfigError, match=r"command line: not YAML: .* in \[1,"):
        parse_value("[1,", where)
