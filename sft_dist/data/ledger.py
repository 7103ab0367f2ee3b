"""A rolling hash over what was trained on, so that two histories can be compared by 64 digits.

    ledger = START
    ledger = fold(ledger, step_plan)       after every step; the newest value is kept in each checkpoint

Each value covers the step's number, epoch and example ids, in global order, and the value before it: equal values mean
the same examples in the same steps from the first one on, whatever the number of ranks or attempts was.
"""

from __future__ import annotations

import hashlib

import numpy as np

from sft_dist.types import StepPlan

START = "0" * 64


def fold(ledger: str, step: StepPlan) -> str:
    """The ledger after `step`: 64 hex digits, SHA-256."""
    examples = [example for pack in step.packs for example in pack.example_ids]
    digest = hashlib.sha256(bytes.fromhex(ledger))
    digest.update(np.array([step.step, step.epoch, *examples], dtype="<i8").tobytes())
    return digest.hexdigest()
