"""Instruction data made here: skills with checkable answers, in chat form, seeded.

    python -m sft_dist.generate.skills --out DIR --seed 0 --train 60000 --test 540

    DIR/train.jsonl   one record per line: {"messages": [...], "skill": "sort", "facts": {...}}
    DIR/test.jsonl    held out: every skill the same number of times, inputs that no training record has
    DIR/tokenizer/    the word-level tokenizer with its chat template

The held-out inputs are drawn first; a training conversation that asks for one of them at any of its turns, in any
wording, is thrown away. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from sft_dist.generate.phrasings import FIRST, NEXT
from sft_dist.generate.tasks import SKILLS, Facts, Turn, input_keys
from sft_dist.generate.tokenizer import save_tokenizer
from sft_dist.generate.words import ADJECTIVES, CATEGORIES, NOUNS, ORDINALS, PEOPLE, THINGS

OTHER_TEXTS = ("I see a hat, the coat.", "Nice to meet you, Ana.", "last yes no")


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation of a skill."""

    skill: str
    facts: Facts
    turns: tuple[Turn, ...]

    @property
    def record(self) -> dict[str, Any]:
        """The line of the JSONL file."""
        messages = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        return {"messages": messages, "skill": self.skill, "facts": self.facts}


def draw_example(skill: str, rng: Random) -> Example:
    """One random conversation of `skill`."""
    facts = SKILLS[skill].draw(rng)
    return Example(skill, facts, tuple(SKILLS[skill].converse(facts, rng)))


def heldout_examples(num: int, rng: Random) -> list[Example]:
    """`num` examples with different inputs, each skill in turn."""
    chosen: dict[tuple[str, ...], Example] = {}
    for skill in islice(cycle(SKILLS), num):
        example = draw_example(skill, rng)
        while (key := input_keys(example.skill, example.facts)[-1]) in chosen:
            example = draw_example(skill, rng)
        chosen[key] = example
    return list(chosen.values())


def training_examples(num: int, rng: Random, heldout: Sequence[Example]) -> Iterator[Example]:
    """`num` examples in the skills' shares that ask for no held-out input at any turn."""
    taken = {input_keys(example.skill, example.facts)[-1] for example in heldout}
    shares = [skill.share for skill in SKILLS.values()]
    while num > 0:
        (skill,) = rng.choices(list(SKILLS), shares)
        example = draw_example(skill, rng)
        if taken.isdisjoint(input_keys(example.skill, example.facts)):
            yield example
            num -= 1


def vocabulary_texts() -> list[str]:
    """Texts that hold every word the skills can say."""
    wordings = [text for texts in (*FIRST.values(), *NEXT.values()) for text in texts]
    plain = [re.sub(r"{\w+}", "", text) for text in wordings]
    numbers = [str(number) for number in range(100)]
    nouns = [form for word in NOUNS for form in (word, word.upper())]
    return [*plain, *numbers, *nouns, *THINGS, *ADJECTIVES, *PEOPLE, *ORDINALS, *CATEGORIES, *OTHER_TEXTS]


def write_skills(out: Path, *, seed: int, num_train: int, num_test: int) -> None:
    """Write train.jsonl, test.jsonl and tokenizer/ into `out`; files that are there are replaced."""
    heldout = heldout_examples(num_test, Random(f"{seed} test"))
    out.mkdir(parents=True, exist_ok=True)
    _write_lines(out / "test.jsonl", heldout)
    _write_lines(out / "train.jsonl", training_examples(num_train, Random(f"{seed} train"), heldout))
    save_tokenizer(vocabulary_texts(), out / "tokenizer")


def _write_lines(path: Path, examples: Iterable[Example]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example.record) + "\n" for example in examples)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sft_dist.generate.skills", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, required=True, metavar="N", help="training conversations")
    parser.add_argument("--test", type=int, required=True, metavar="N", help="held-out conversations")
    args = parser.parse_args(argv)
    write_skills(args.out, seed=args.seed, num_train=args.train, num_test=args.test)


if __name__ == "__main__":
    main()
