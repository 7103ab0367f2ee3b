"""A misspelt key is always refused, and nearly always answered with the key that was meant."""

from __future__ import annotations

import random
import string

import pytest

from sft_dist.config import keys
from sft_dist.config.loader import load_recipe
from sft_dist.errors import ConfigError

LETTERS = string.ascii_lowercase + "_"
PER_KEY = 12


def typos(word: str) -> set[str]:
    """Every single edit of a word: one letter deleted, swapped with its neighbour, substituted or inserted."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    deleted = {a + b[1:] for a, b in cuts if b}
    swapped = {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    substituted = {a + letter + b[1:] for a, b in cuts if b for letter in LETTERS}
    inserted = {a + letter + b for a, b in cuts for letter in LETTERS}
    return {typo for typo in deleted | swapped | substituted | inserted if typo and not typo.startswith("_")} - {word}


def misspelt() -> list[tuple[str, str]]:
    """(misspelt, meant) for a seeded sample of edits of every key at every level."""
    chooser = random.Random(0)
    cases = []
    for path in (key.replace("*", "0") for key in keys.index()):
        parent, _, name = path.rpartition(".")
        wrong = sorted(typos(name) - set(keys.children(parent)))
        chosen = chooser.sample(wrong, min(PER_KEY, len(wrong)))
        cases += [(f"{parent}.{typo}" if parent else typo, path) for typo in chosen]
    return cases


def answer(wrong: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe([], ["model.path=gpt2", "data.sources.0.path=x", f"{wrong}=1"])
    return str(caught.value)


def test_every_single_edit_is_refused_and_at_least_95_percent_are_answered_right() -> None:
    cases = misspelt()
    failed = [(wrong, meant) for wrong, meant in cases if f"did you mean '{meant}'?" not in answer(wrong)]
    assert len(cases) > 700
    assert len(failed) <= 0.05 * len(cases), failed[:20]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("weigth_decay", "optim.weight_decay"),
        ("optim.weight-decay", "optim.weight_decay"),
        ("optim.LR", "optim.lr"),
        ("data.sources.0.frmat", "data.sources.0.format"),
        ("moedl", "model"),
        ("seq_len", "data.seq_len"),
        ("seed", "run.seed"),
    ],
)
def test_the_answer_is_a_dotted_path(wrong: str, meant: str) -> None:
    assert f"did you mean '{meant}'?" in answer(wrong)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("lr", "lr", 0), ("lr", "rl", 1), ("lr", "l", 1), ("abc", "xyz", 3), ("", "ab", 2)]
)
def test_edits(a: str, b: str, distance: int) -> None:
    assert keys.edits(a, b) == keys.edits(b, a) == distance


def test_rules_are_words() -> None:
    rules = {path: key.rule for path, key in keys.index().items()}
    assert rules["optim.lr"] == "a number > 0, or auto"
    assert rules["data.eval_fraction"] == "a number >= 0 and < 1"
    assert rules["model.trust_remote_code"] == "true or false"
    assert rules["tuning.targets"] == "text, or a list, each entry text"
    assert all(rules.values())
