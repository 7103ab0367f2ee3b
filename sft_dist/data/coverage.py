"""What instructions ask for and in which language: the spread that decides what a model can do afterwards.

    task_of("Please write a short story about a cat.")     Task("write", "story")
    script_of(text), language_of(text)                     "Latin", "en"

The tasks of an instruction set are its pairs of root verb and object (Wang et al., 2022, Self-Instruct, figure 2).
There they come from a parser; here from a rule that can be read: of the first sentence, leave out politeness and what
stands before an opening comma ("Given the text, ..."); the first word is the verb; the object is the last word before
the first preposition, conjunction or participle. Questions have their question word as the verb: ("what", "capital").
The rule is for English; other languages are counted by script and language only.

Languages are told by py3langid (Lui and Baldwin, 2012), whose model comes with the package; on a few words it guesses.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from itertools import dropwhile
from typing import NamedTuple

_SENTENCE = re.compile(r"[.!?:\n]")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_POLITE = re.compile(
    r"(?:please|kindly|hi|hello|hey|now|then|next|can you|could you|would you|will you|i want you to|i need you to|"
    r"i would like you to|i'd like you to|you are asked to|your task is to|you need to|you should|help me|let's)"
    r"\b[, ]*",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"(?:given|in|for|from|if|using|based|as|with|after|when|suppose|imagine|assume|to|at|on)\b[^,]*,\s*", re.IGNORECASE
)


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_QUESTION = _words(
    "what which who whom whose when where why how is are was were do does did can could should would will has have"
)
_NO_VERB = _words(
    "the a an this that these those my your our his her its their i you he she it we they there here some all any no",
    "each every one two three and or but not yes no oh ok okay sure great thanks thank wow well sorry",
)
_ENDS_OBJECT = _words(
    "about above across after against along among around as at because before behind below beneath beside between",
    "beyond by during for from if in inside into like near of off on onto or over per regarding since so than that",
    "through to toward under until up upon via when where whether which while who whose why how what with within",
    "without and but using based containing describing explaining including given related is are was were used",
    "consisting having making being called named does do",
)
_NOT_OBJECT = _words(
    "me us you them him it this these those the a an your my our their its his her some any all",
)
_LANGUAGE_CHARACTERS = 400


class Task(NamedTuple):
    """Root verb (or question word) and its object, lower case; the object may be empty."""

    verb: str
    object: str


def task_of(instruction: str) -> Task | None:
    """The task of an English instruction; None where the rule finds no verb."""
    sentence = _SENTENCE.split(instruction.strip(), maxsplit=1)[0]
    while polite := _POLITE.match(sentence):
        sentence = sentence[polite.end() :]
    sentence = _PREAMBLE.sub("", sentence)
    words = [word.lower() for word in _WORD.findall(sentence)]
    if not words or words[0] in _NO_VERB or "'" in words[0] or script_of(sentence) != "Latin":
        return None
    verb, rest = words[0], words[1:]
    if verb in _QUESTION:
        rest = list(dropwhile(lambda word: word in _QUESTION or word in _NO_VERB, rest))
    elif words[:3] == ["come", "up", "with"]:
        rest = words[3:]
    end = next((at for at, word in enumerate(rest) if word in _ENDS_OBJECT), len(rest))
    nouns = [word for word in rest[:end] if word not in _NOT_OBJECT]
    return Task(verb, nouns[-1] if nouns else "")


def script_of(text: str) -> str:
    """The Unicode script most letters of the first thousand characters are of; `none` without letters.

    The script is the first word of a letter's name in the Unicode database, which holds for all large scripts;
    Chinese characters are Han, and Japanese text is told by its kana.
    """
    counts = Counter(_script(letter) for letter in text[:1000] if letter.isalpha())
    if counts["Hiragana"] + counts["Katakana"] > 0.1 * counts.total():
        return "Japanese"
    return counts.most_common(1)[0][0] if counts else "none"


def language_of(text: str) -> str:
    """ISO code of the likeliest language of the first few hundred characters."""
    import py3langid  # type: ignore[import-untyped]

    code: str = py3langid.classify(text[:_LANGUAGE_CHARACTERS])[0]
    return code


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "unknown").split(maxsplit=1)[0].capitalize()
    return {"Cjk": "Han", "Fullwidth": "Latin"}.get(first, first)
