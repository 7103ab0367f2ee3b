"""Judges an answer from the facts of its task, without the code that made the answer.

Each check states a property ("a permutation of the input in which no word comes before a smaller one") or replays the
task in another way, so that a mistake in `tasks` does not hide in its own test.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from sft_dist.generate.words import CATEGORIES, OPPOSITES, ORDINALS

Facts = dict[str, str]
Check = Callable[[Facts, str], bool]


def is_right(skill: str, facts: Facts, answer: str) -> bool:
    """Whether `answer` is the right last answer to a task of `skill` about `facts`."""
    return CHECKS[skill](facts, answer)


def _same_words(words: str, answer: str) -> bool:
    return Counter(words.split()) == Counter(answer.split())


def _copied(words: str, answer: str) -> bool:
    return answer == words


def _reversed(words: str, answer: str) -> bool:
    given, said = words.split(), answer.split()
    return len(given) == len(said) and all(word == given[-1 - place] for place, word in enumerate(said))


def _sorted(words: str, answer: str) -> bool:
    said = answer.split()
    return _same_words(words, answer) and all(a <= b for a, b in pairwise(said))


def _in_capitals(words: str, answer: str) -> bool:
    return answer.isupper() and answer.lower() == words


def _counted(words: str, answer: str) -> bool:
    return answer == str(words.count(" ") + 1)


OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "copy": _copied,
    "reverse": _reversed,
    "sort": _sorted,
    "capitals": _in_capitals,
    "count": _counted,
}


def _at_position(words: str, position: str, answer: str) -> bool:
    before = re.fullmatch(rf"((?:\w+ )*){answer}((?: \w+)*)", words)
    if before is None:
        return False
    return not before[2] if position == "last" else before[1].count(" ") == ORDINALS.index(position)


def _membership(words: str, word: str, answer: str) -> bool:
    return answer == ("yes" if re.search(rf"\b{word}\b", words) else "no")


def _added(facts: Facts, answer: str) -> bool:
    return answer.isdecimal() and int(answer) - int(facts["a"]) == int(facts["b"])


def _largest(facts: Facts, answer: str) -> bool:
    numbers = facts["numbers"].split()
    return answer in numbers and all(int(number) <= int(answer) for number in numbers)


def _odd(facts: Facts, answer: str) -> bool:
    rest = [word for word in facts["words"].split() if word != answer]
    kinds = [{kind for kind, members in CATEGORIES.items() if word in members} for word in (*rest, answer)]
    return len(rest) == 3 and kinds[0] == kinds[1] == kinds[2] != kinds[3]


def _picked(facts: Facts, answer: str) -> bool:
    members, left = CATEGORIES[facts["category"]], iter(facts["words"].split())
    in_order = all(word in left for word in answer.split())  # consumes: a subsequence of the list
    wanted = sum(word in members for word in facts["words"].split())
    return in_order and wanted == len(answer.split()) and all(word in members for word in answer.split())


def _opposite(facts: Facts, answer: str) -> bool:
    given, said = facts["words"].split(), answer.split()
    return len(given) == len(said) and all(OPPOSITES[b] == a for a, b in zip(given, said, strict=True))


def _seen(scene: str, colour: str, answer: str) -> bool:
    """The answer names one thing, in the words of the scene, and its colour is the one asked for."""
    named = re.fullmatch(rf"the ({colour} \w+)", answer)
    return named is not None and re.search(rf" a {named[1]}[,.]", scene) is not None


def _list_chat(facts: Facts, answer: str) -> bool:
    kind, _, about = facts["asked"].split(", ")[-1].partition(" ")
    words = facts["words"]
    if kind == "position":
        return _at_position(words, about, answer)
    return _counted(words, answer) if kind == "count" else _membership(words, about, answer)


def _follow_up(facts: Facts, answer: str) -> bool:
    """Only the newest sort and the reversals after it matter for the order that the last turn works on."""
    words, (*before, last) = facts["words"].split(), facts["operations"].split()
    if "sort" in before:
        words = sorted(words)
        before = before[len(before) - before[::-1].index("sort") :]
    if before.count("reverse") % 2:
        words.reverse()
    return OPERATIONS[last](" ".join(words), answer)


def _on_words(check: Callable[[str, str], bool]) -> Check:
    return lambda facts, answer: check(facts["words"], answer)


def _recall(facts: Facts, answer: str) -> bool:
    return answer == {"name": facts["person"], "liking": facts["thing"]}[facts["asked"]]


CHECKS: dict[str, Check] = {
    **{name: _on_words(check) for name, check in OPERATIONS.items()},
    "position": lambda facts, answer: _at_position(facts["words"], facts["position"], answer),
    "member": lambda facts, answer: _membership(facts["words"], facts["word"], answer),
    "add": _added,
    "largest": _largest,
    "odd_one_out": _odd,
    "pick": _picked,
    "opposites": _opposite,
    "look_up": lambda facts, answer: _seen(facts["scene"], facts["colour"], answer),
    "scene_chat": lambda facts, answer: _seen(facts["scene"], facts["asked"].split()[-1], answer),
    "follow_up": _follow_up,
    "list_chat": _list_chat,
    "recall": _recall,
}
