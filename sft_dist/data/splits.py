"""Which conversations are held out: a function of their content and a seed.

Exact duplicates always fall on one side, the order of the file does not matter, and the counts are exact: the contents
with the smallest keyed hashes are held out. Adding rows therefore moves only few others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from sft_dist.types import Conversation

Split = Literal["train", "eval", "test"]


def content_key(conversation: Conversation) -> bytes:
    """32 bytes that depend on what is said, not on the file, the place or loss weights."""
    said = [(m.role, m.content, dict(m.extra)) for m in conversation.messages]
    text = json.dumps([said, conversation.tools], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def assign_split(conversation: Conversation, eval_fraction: float, test_fraction: float, seed: int) -> Split:
    """The split of one conversation on its own: fractions hold on average. `assign_splits` makes them exact."""
    place = int.from_bytes(_drawn(content_key(conversation), seed)[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "eval" if place < test_fraction + eval_fraction else "train"


def assign_splits(
    conversations: Sequence[Conversation], eval_fraction: float, test_fraction: float, seed: int
) -> list[Split]:
    """The split of each conversation, with exact counts of unique contents; see `split_keys`."""
    return split_keys([content_key(one) for one in conversations], eval_fraction, test_fraction, seed)


def split_keys(keys: Sequence[bytes], eval_fraction: float, test_fraction: float, seed: int) -> list[Split]:
    """The split of each content key.

    A fraction above 0 holds out at least one content, as long as one is left to train on (evaluation comes first).
    """
    unique = sorted(set(keys), key=lambda key: _drawn(key, seed))
    num_eval = _count(eval_fraction, len(unique), room=len(unique) - 1)
    num_test = _count(test_fraction, len(unique), room=len(unique) - 1 - num_eval)
    held_out: dict[bytes, Split] = dict.fromkeys(unique[:num_test], "test")
    held_out |= dict.fromkeys(unique[num_test : num_test + num_eval], "eval")
    return [held_out.get(key, "train") for key in keys]


def _drawn(key: bytes, seed: int) -> bytes:
    return hashlib.sha256(f"split {seed} ".encode() + key).digest()


def _count(fraction: float, num_unique: int, room: int) -> int:
    wanted = max(1, round(fraction * num_unique)) if fraction > 0 else 0
    return max(0, min(wanted, room))
