"""Instruction skills whose answers can be checked: what the quickstart teaches a model from random weights.

A skill draws facts (the input), asks about them in one of several phrasings, and solves them. Facts are flat
strings, so `skill_checks` can judge an answer from the facts alone, without the code that made it.

    facts  = {"words": "plum fig kiwi"}
    turns  = [("Sort these words: plum fig kiwi", "fig kiwi plum")]
    record = {"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "skill": "sort", "facts": facts}

Held-out inputs are drawn first, and every training draw that hits one of them, in any phrasing, is thrown away.

    python -m sft_dist.generate.skills --out DIR --seed 0 --train 24000 --test 480
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sft_dist.generate.words import (
    ADJECTIVES,
    CATEGORIES,
    CATEGORY_OF,
    NOUNS,
    OPPOSITES,
    ORDINALS,
    PEOPLE,
)

Facts = dict[str, str]
Turn = tuple[str, str]  # what the user says, what the assistant should answer


def _words(rng: Random, low: int, high: int) -> str:
    return " ".join(rng.sample(NOUNS, rng.randint(low, high)))


# Operations on a list of words: used alone, and as the second turn of a conversation.
OPERATIONS: dict[str, Callable[[list[str]], str]] = {
    "copy": " ".join,
    "reverse": lambda words: " ".join(words[::-1]),
    "sort": lambda words: " ".join(sorted(words)),
    "capitals": lambda words: " ".join(words).upper(),
    "first": lambda words: words[0],
    "last": lambda words: words[-1],
    "count": lambda words: str(len(words)),
}

PHRASINGS: dict[str, tuple[str, ...]] = {
    "copy": (
        "Repeat these words: {words}",
        "Say this again: {words}",
        "Copy the list: {words}",
        "Write exactly what I write: {words}",
    ),
    "reverse": (
        "Reverse these words: {words}",
        "Write the list backwards: {words}",
        "Say these words in reverse order: {words}",
        "Turn this list around: {words}",
    ),
    "sort": (
        "Sort these words: {words}",
        "Put the words in alphabetical order: {words}",
        "Write this list from a to z: {words}",
        "Order these words by the alphabet: {words}",
    ),
    "capitals": (
        "Write these words in capitals: {words}",
        "Put this list in upper case: {words}",
        "Shout these words: {words}",
    ),
    "count": (
        "How many words are in this list? {words}",
        "Count these words: {words}",
        "What is the number of words here? {words}",
    ),
    "position": (
        "What is the {position} word? {words}",
        "Give me the {position} word of this list: {words}",
        "From this list take only the {position} word: {words}",
    ),
    "add": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "How much is {a} + {b}?",
        "I have {a} coins and get {b} more. How many coins do I have?",
    ),
    "larger": (
        "Which number is larger, {a} or {b}?",
        "Give me the larger number: {a} {b}",
        "Of {a} and {b}, which is more?",
    ),
    "odd_one_out": (
        "Which word does not belong? {words}",
        "Find the odd one out: {words}",
        "One of these words is not like the rest. Which one? {words}",
    ),
    "pick": (
        "Which of these words are {category}? {words}",
        "From this list take only the {category}: {words}",
        "Find all {category} in this list: {words}",
    ),
    "opposites": (
        "What are the opposites of these words? {words}",
        "Write the opposite of each word: {words}",
        "Say the contrary: {words}",
    ),
    "member": (
        "Is {word} in this list? {words}",
        "Does this list have the word {word}? {words}",
        "Answer yes or no: is {word} one of these words? {words}",
    ),
    "who_has": (
        "{story} Who has the {asked}?",
        "Who has the {asked}? {story}",
        "{story} Tell me who has the {asked}.",
    ),
    "what_has": (
        "{story} What does {asked} have?",
        "Read this: {story} Which thing does {asked} have?",
        "What does {asked} have? {story}",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "reverse": ("Now reverse your answer.", "And backwards?", "Turn your answer around."),
    "capitals": ("Now write your answer in capitals.", "And in upper case?", "Shout your answer."),
    "first": ("What is the first word of your answer?", "Only the first word, please."),
    "last": ("What is the last word of your answer?", "Only the last word, please."),
    "count": ("How many words are in your answer?", "Count the words of your answer."),
}


@dataclass(frozen=True)
class Skill:
    """How to draw an input, and the conversation that follows from it."""

    draw: Callable[[Random], Facts]
    converse: Callable[[Facts, Random], list[Turn]]
    system: str = ""  # phrasing of a system message, empty for none
    key: Callable[[Facts], tuple[str, ...]] = lambda facts: tuple(sorted(facts.items()))  # type: ignore[assignment, return-value]


def _single(name: str, draw: Callable[[Random], Facts], solve: Callable[[Facts], str], **more: Any) -> Skill:
    """A skill of one question, in the phrasings of `name`."""
    return Skill(draw, lambda facts, rng: [(rng.choice(PHRASINGS[name]).format(**facts), solve(facts))], **more)


def _on_words(name: str, low: int = 2, high: int = 5) -> Skill:
    return _single(name, lambda rng: {"words": _words(rng, low, high)}, lambda f: OPERATIONS[name](f["words"].split()))


def _draw_position(rng: Random) -> Facts:
    words = _words(rng, 3, 5)
    return {"words": words, "position": rng.choice((*ORDINALS[: len(words.split()) - 1], "last"))}


def _at_position(facts: Facts) -> str:
    words = facts["words"].split()
    return words[-1] if facts["position"] == "last" else words[ORDINALS.index(facts["position"])]


def _draw_sum(rng: Random) -> Facts:
    a = rng.randint(10, 89)
    return {"a": str(a), "b": str(rng.randint(10, 99 - a) if a < 89 else 10)}


def _draw_pair(rng: Random) -> Facts:
    a, b = rng.sample(range(10, 100), 2)
    return {"a": str(a), "b": str(b)}


def _draw_odd(rng: Random) -> Facts:
    same, other = rng.sample(list(CATEGORIES), 2)
    words = [*rng.sample(CATEGORIES[same], 3), rng.choice(CATEGORIES[other])]
    rng.shuffle(words)
    return {"words": " ".join(words)}


def _odd(facts: Facts) -> str:
    words = facts["words"].split()
    kinds = [CATEGORY_OF[word] for word in words]
    return next(word for word, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1)


def _draw_pick(rng: Random) -> Facts:
    category = rng.choice(list(CATEGORIES))
    wanted = rng.sample(CATEGORIES[category], rng.randint(1, 3))
    others = rng.sample([word for word in NOUNS if CATEGORY_OF[word] != category], 2)
    words = [*wanted, *others]
    rng.shuffle(words)
    return {"words": " ".join(words), "category": category}


def _pick(facts: Facts) -> str:
    return " ".join(word for word in facts["words"].split() if CATEGORY_OF[word] == facts["category"])


def _draw_member(rng: Random) -> Facts:
    words = _words(rng, 3, 5)
    inside = rng.random() < 0.5
    pool = words.split() if inside else [word for word in NOUNS if word not in words.split()]
    return {"words": words, "word": rng.choice(pool)}


def _draw_story(rng: Random) -> tuple[str, list[str], list[str]]:
    count = rng.randint(2, 4)
    people, things = rng.sample(PEOPLE, count), rng.sample(NOUNS, count)
    return " ".join(f"{p} has the {t}." for p, t in zip(people, things, strict=True)), people, things


def _draw_who(rng: Random) -> Facts:
    story, _, things = _draw_story(rng)
    return {"story": story, "asked": rng.choice(things)}


def _draw_what(rng: Random) -> Facts:
    story, people, _ = _draw_story(rng)
    return {"story": story, "asked": rng.choice(people)}


def _owners(facts: Facts) -> dict[str, str]:
    sentences = [sentence.split() for sentence in facts["story"].split(".") if sentence]
    return {person: thing for person, _, _, thing in sentences}


def _draw_follow_up(rng: Random) -> Facts:
    return {
        "words": _words(rng, 2, 4),
        "first": rng.choice(("copy", "reverse", "sort")),
        "then": rng.choice(tuple(FOLLOW_UPS)),
    }


def _follow_up(facts: Facts, rng: Random) -> list[Turn]:
    answer = OPERATIONS[facts["first"]](facts["words"].split())
    return [
        (rng.choice(PHRASINGS[facts["first"]]).format(**facts), answer),
        (rng.choice(FOLLOW_UPS[facts["then"]]), OPERATIONS[facts["then"]](answer.split())),
    ]


def _recall(facts: Facts, rng: Random) -> list[Turn]:
    hello = rng.choice(("Hello, I am {person} and I like the {thing}.", "My name is {person}. I like the {thing}."))
    asked = {
        "person": ("What is my name?", "Who am I?"),
        "thing": ("What do I like?", "Which thing do I like?"),
    }[facts["asked"]]
    return [
        (hello.format(**facts), f"Nice to meet you, {facts['person']}."),
        (rng.choice(asked), facts[facts["asked"]]),
    ]


def _draw_recall(rng: Random) -> Facts:
    return {"person": rng.choice(PEOPLE), "thing": rng.choice(NOUNS), "asked": rng.choice(("person", "thing"))}


SKILLS: dict[str, Skill] = {
    "copy": _on_words("copy"),
    "reverse": _on_words("reverse"),
    "sort": _on_words("sort", 2, 4),
    "capitals": _on_words("capitals", 2, 4),
    "count": _on_words("count", 2, 6),
    "position": _single("position", _draw_position, _at_position),
    "add": _single(
        "add",
        _draw_sum,
        lambda f: str(int(f["a"]) + int(f["b"])),
        key=lambda f: tuple(sorted((f["a"], f["b"]))),
    ),
    "larger": _single(
        "larger",
        _draw_pair,
        lambda f: max(f["a"], f["b"], key=int),
        key=lambda f: tuple(sorted((f["a"], f["b"]))),
    ),
    "odd_one_out": _single("odd_one_out", _draw_odd, _odd),
    "pick": _single("pick", _draw_pick, _pick),
    "opposites": _single(
        "opposites",
        lambda rng: {"words": " ".join(rng.sample(ADJECTIVES, rng.randint(2, 3)))},
        lambda f: " ".join(OPPOSITES[word] for word in f["words"].split()),
    ),
    "member": _single("member", _draw_member, lambda f: "yes" if f["word"] in f["words"].split() else "no"),
    "who_has": _single("who_has", _draw_who, lambda f: {t: p for p, t in _owners(f).items()}[f["asked"]]),
    "what_has": _single("what_has", _draw_what, lambda f: _owners(f)[f["asked"]]),
    "follow_up": Skill(_draw_follow_up, _follow_up),
    "recall": Skill(_draw_recall, _recall),
}
