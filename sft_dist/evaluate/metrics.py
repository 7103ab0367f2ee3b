"""Scores of one answer against its reference."""

from __future__ import annotations


def normalise(text: str) -> str:
    """Runs of white space become one blank, ends are trimmed; case and punctuation count."""
    return " ".join(text.split())


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two say the same, white space aside."""
    return normalise(answer) == normalise(reference)
