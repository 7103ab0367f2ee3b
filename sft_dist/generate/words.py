"""The small world that the skills talk about: nouns by category, adjectives with opposites, people.

Everything is closed and in lower case, so that a word-level vocabulary covers every text the skills can make. Words are
spelled once in exactly one category: "odd one out" has a single right answer.
"""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "goat", "horse", "otter", "wolf"),
    "fruits": ("apple", "cherry", "fig", "kiwi", "lemon", "plum"),
    "colours": ("black", "blue", "green", "pink", "red", "white"),
    "tools": ("axe", "chisel", "drill", "hammer", "saw", "shovel"),
}

NOUNS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
THINGS: tuple[str, ...] = ("boot", "coat", "glove", "hat", "jacket", "scarf", "shirt", "sock")
CATEGORY_OF: dict[str, str] = {word: category for category, words in CATEGORIES.items() for word in words}

_OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "young"),
    ("dark", "light"),
)
OPPOSITES: dict[str, str] = {a: b for pair in _OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}
ADJECTIVES: tuple[str, ...] = tuple(OPPOSITES)

PEOPLE: tuple[str, ...] = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn")
ORDINALS: tuple[str, ...] = ("first", "second")
