"""The small world that the skills talk about: nouns by category, adjectives with opposites, people.

Everything is closed and in lower case, so that a word-level vocabulary covers every text the skills can make. Words are
spelled once in exactly one category: "odd one out" has a single right answer.
"""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "horse", "mouse", "goat", "wolf", "otter"),
    "fruits": ("apple", "cherry", "fig", "kiwi", "lemon", "mango", "plum"),
    "colours": ("red", "blue", "green", "yellow", "black", "white", "pink"),
    "tools": ("hammer", "saw", "drill", "chisel", "wrench", "axe", "shovel"),
    "places": ("river", "forest", "island", "harbour", "village", "desert", "canyon"),
    "clothes": ("jacket", "scarf", "glove", "shirt", "boot", "hat", "coat"),
}

NOUNS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
THINGS: tuple[str, ...] = tuple(word for kind in ("animals", "fruits", "tools", "clothes") for word in CATEGORIES[kind])
CATEGORY_OF: dict[str, str] = {word: category for category, words in CATEGORIES.items() for word in words}

_OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "young"),
    ("dark", "light"),
    ("wet", "dry"),
    ("full", "empty"),
    ("loud", "quiet"),
    ("hard", "soft"),
    ("open", "closed"),
    ("rich", "poor"),
    ("early", "late"),
)
OPPOSITES: dict[str, str] = {a: b for pair in _OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}
ADJECTIVES: tuple[str, ...] = tuple(OPPOSITES)

PEOPLE: tuple[str, ...] = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Kim")
ORDINALS: tuple[str, ...] = ("first", "second", "third", "fourth")
