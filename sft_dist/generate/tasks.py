"""The skills: how to draw an input, what to ask about it, and the right answer.

A task is drawn as facts (flat strings) and becomes a conversation. The facts alone decide every answer, so
`checks` can judge an answer without the code that made it.

    facts = {"words": "plum fig kiwi"}
    turns = [("Sort these words: plum fig kiwi", "fig kiwi plum")]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sft_dist.generate.phrasings import FIRST, NEXT
from sft_dist.generate.words import ADJECTIVES, CATEGORIES, CATEGORY_OF, NOUNS, OPPOSITES, ORDINALS, PEOPLE, THINGS

Facts = dict[str, str]
Turn = tuple[str, str]  # what the user says, what the assistant should answer


@dataclass(frozen=True)
class Skill:
    """`draw` makes an input, `converse` the turns about it. `share` is its weight in the training mix."""

    draw: Callable[[Random], Facts]
    converse: Callable[[Facts, Random], list[Turn]]
    share: float = 1.0


LIST_OPERATIONS: dict[str, Callable[[list[str]], str]] = {
    "copy": " ".join,
    "reverse": lambda words: " ".join(words[::-1]),
    "sort": lambda words: " ".join(sorted(words)),
    "capitals": lambda words: " ".join(words).upper(),
    "count": lambda words: str(len(words)),
}


def at_position(words: list[str], position: str) -> str:
    """The word at an ordinal ("second") or the last one."""
    return words[-1] if position == "last" else words[ORDINALS.index(position)]


def _positions(words: list[str]) -> tuple[str, ...]:
    return (*ORDINALS[: len(words) - 1], "last")


def _draw_words(low: int, high: int) -> Callable[[Random], Facts]:
    return lambda rng: {"words": " ".join(rng.sample(NOUNS, rng.randint(low, high)))}


def _ask_first(name: str, solve: Callable[[Facts], str]) -> Callable[[Facts, Random], list[Turn]]:
    return lambda facts, rng: [(rng.choice(FIRST[name]).format(**facts), solve(facts))]


def _list_skill(name: str, low: int, high: int, share: float = 1.0) -> Skill:
    solve = LIST_OPERATIONS[name]
    return Skill(_draw_words(low, high), _ask_first(name, lambda facts: solve(facts["words"].split())), share)


# position, member: one question about one list


def _draw_position(rng: Random) -> Facts:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    return {"words": " ".join(words), "position": rng.choice(_positions(words))}


def _draw_member(rng: Random) -> Facts:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    return {"words": " ".join(words), "word": _word_inside_or_not(words, rng)}


def _word_inside_or_not(words: list[str], rng: Random) -> str:
    return rng.choice(words if rng.random() < 0.5 else [word for word in NOUNS if word not in words])


# numbers


def _draw_sum(rng: Random) -> Facts:
    b = rng.randint(1, 4)
    a = 10 * rng.randint(10, 99) + rng.randint(0, 9 - b)  # no carry: the model has minutes, not days
    return {"a": str(a), "b": str(b)}


def _draw_numbers(rng: Random) -> Facts:
    return {"numbers": " ".join(map(str, rng.sample(range(10), rng.randint(2, 4))))}


# categories


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
    others = [word for word in NOUNS if CATEGORY_OF[word] != category]
    words = [*rng.sample(CATEGORIES[category], rng.randint(1, 3)), *rng.sample(others, 2)]
    rng.shuffle(words)
    return {"words": " ".join(words), "category": category}


def _pick(facts: Facts) -> str:
    return " ".join(word for word in facts["words"].split() if CATEGORY_OF[word] == facts["category"])


# look-up in a given context: which of the things that were named has this colour


def _draw_things(rng: Random) -> dict[str, str]:
    """Colour -> thing, in the order in which the text names them."""
    count = rng.randint(2, 4)
    return dict(zip(rng.sample(CATEGORIES["colours"], count), rng.sample(THINGS, count), strict=True))


def describe_things(things: dict[str, str]) -> str:
    """I see a red hat, a blue boot."""
    return "I see " + ", ".join(f"a {colour} {thing}" for colour, thing in things.items()) + "."


def look_up(scene: str, colour: str) -> str:
    """The thing of that colour, as the answer names it: the blue boot."""
    words = scene.replace(",", "").rstrip(".").split()
    return f"the {colour} {words[words.index(colour) + 1]}"


def _draw_look_up(rng: Random) -> Facts:
    things = _draw_things(rng)
    return {"scene": describe_things(things), "colour": rng.choice(list(things))}


def _draw_scene_chat(rng: Random) -> Facts:
    things = _draw_things(rng)
    return {"scene": describe_things(things), "asked": " ".join(rng.sample(list(things), len(things)))}


def _scene_chat(facts: Facts, rng: Random) -> list[Turn]:
    turns: list[Turn] = []
    for number, colour in enumerate(facts["asked"].split()):
        wording = rng.choice((NEXT if number else FIRST)["look_up"])
        turns.append((wording.format(scene=facts["scene"], colour=colour), look_up(facts["scene"], colour)))
    return turns


# follow-ups: each turn works on the answer before it


def _draw_follow_up(rng: Random) -> Facts:
    operations = [rng.choice(("copy", "reverse", "sort"))]
    for _ in range(rng.randint(1, 3)):
        operations.append(rng.choice([name for name in ("copy", "reverse", "sort") if name != operations[-1]]))
    if rng.random() < 0.6:
        operations[-1] = rng.choice(("capitals", "count"))
    words = rng.sample(NOUNS, rng.randint(2, 4))
    return {"words": " ".join(words), "operations": " ".join(operations)}


def _follow_up(facts: Facts, rng: Random) -> list[Turn]:
    current, turns = facts["words"], []
    for number, name in enumerate(facts["operations"].split()):
        wording = rng.choice((NEXT if number else FIRST)[name]).format(words=facts["words"])
        current = LIST_OPERATIONS[name](current.split())
        turns.append((wording, current))
    return turns


# a list given once, then several questions about it


def _draw_list_chat(rng: Random) -> Facts:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    elsewhere = rng.sample([word for word in NOUNS if word not in words], 2)
    questions = [
        *(f"position {position}" for position in rng.sample(_positions(words), 2)),
        *(f"member {word}" for word in (*rng.sample(words, 2), *elsewhere)),
        "count",
    ]
    return {"words": " ".join(words), "asked": ", ".join(rng.sample(questions, rng.randint(2, 4)))}


def _list_chat(facts: Facts, rng: Random) -> list[Turn]:
    words = facts["words"].split()
    turns = [(rng.choice(FIRST["list"]).format(**facts), facts["words"])]
    for question in facts["asked"].split(", "):
        kind, _, about = question.partition(" ")
        turns.append((rng.choice(NEXT[kind]).format(position=about, word=about), _about_list(words, kind, about)))
    return turns


def _about_list(words: list[str], kind: str, about: str) -> str:
    if kind == "position":
        return at_position(words, about)
    return str(len(words)) if kind == "count" else ("yes" if about in words else "no")


# what the user said about themselves


def _draw_recall(rng: Random) -> Facts:
    return {"person": rng.choice(PEOPLE), "thing": rng.choice(THINGS), "asked": rng.choice(("name", "liking"))}


def _recall(facts: Facts, rng: Random) -> list[Turn]:
    answer = facts["person"] if facts["asked"] == "name" else facts["thing"]
    return [
        (rng.choice(FIRST["hello"]).format(**facts), f"Nice to meet you, {facts['person']}."),
        (rng.choice(NEXT[facts["asked"]]), answer),
    ]


def _draw_opposites(rng: Random) -> Facts:
    return {"words": " ".join(rng.sample(ADJECTIVES, rng.randint(2, 3)))}


SKILLS: dict[str, Skill] = {
    "copy": _list_skill("copy", 2, 4, share=0.5),
    "reverse": _list_skill("reverse", 2, 4),
    "sort": _list_skill("sort", 2, 4),
    "capitals": _list_skill("capitals", 2, 4, share=0.5),
    "count": _list_skill("count", 2, 5, share=0.5),
    "position": Skill(
        _draw_position,
        _ask_first("position", lambda facts: at_position(facts["words"].split(), facts["position"])),
        share=2.5,
    ),
    "member": Skill(
        _draw_member,
        _ask_first("member", lambda facts: "yes" if facts["word"] in facts["words"].split() else "no"),
        share=1.5,
    ),
    "add": Skill(_draw_sum, _ask_first("add", lambda facts: str(int(facts["a"]) + int(facts["b"]))), share=2.0),
    "largest": Skill(_draw_numbers, _ask_first("largest", lambda facts: max(facts["numbers"].split()))),
    "odd_one_out": Skill(_draw_odd, _ask_first("odd_one_out", _odd), share=1.5),
    "pick": Skill(_draw_pick, _ask_first("pick", _pick), share=1.5),
    "opposites": Skill(
        _draw_opposites,
        _ask_first("opposites", lambda facts: " ".join(OPPOSITES[word] for word in facts["words"].split())),
        share=0.5,
    ),
    "look_up": Skill(
        _draw_look_up,
        _ask_first("look_up", lambda facts: look_up(facts["scene"], facts["colour"])),
        share=2.0,
    ),
    "scene_chat": Skill(_draw_scene_chat, _scene_chat, share=2.0),
    "follow_up": Skill(_draw_follow_up, _follow_up, share=2.0),
    "list_chat": Skill(_draw_list_chat, _list_chat, share=3.0),
    "recall": Skill(_draw_recall, _recall, share=0.5),
}


def input_keys(skill: str, facts: Facts) -> list[tuple[str, ...]]:
    """What each turn asks for, whatever the wording: two turns with the same key need the same knowledge.

    The last key is that of the conversation's last turn, the one a held-out example is judged by.
    """
    if skill == "largest":  # the order of the numbers does not matter
        return [(skill, *sorted(facts["numbers"].split()))]
    if skill == "follow_up":
        done = facts["operations"].split()
        later = [(skill, facts["words"], *done[: number + 1]) for number in range(1, len(done))]
        return [(done[0], facts["words"]), *later]
    if skill == "scene_chat":
        colours = facts["asked"].split()
        later = [(skill, facts["scene"], *colours[: number + 1]) for number in range(1, len(colours))]
        return [("look_up", facts["scene"], colours[0]), *later]
    if skill == "list_chat":
        asked = facts["asked"].split(", ")
        return [("list", facts["words"]), *((skill, facts["words"], *asked[: n + 1]) for n in range(len(asked)))]
    return [(skill, *facts.values())]
