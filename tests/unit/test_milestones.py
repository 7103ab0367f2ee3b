"""What happens between steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sft_dist import milestones
from sft_dist.errors import CheckpointError


def test_a_checkpoint_of_other_data_is_not_resumed() -> None:
    """The plan's hash covers every token up to the step; of a stream nothing else does."""
    adopted: list[object] = []
    engine = SimpleNamespace(state=dict, adopt=adopted.append, optimizer=SimpleNamespace(param_groups=[], state={}))
    plan = SimpleNamespace(digest_up_to=lambda step: f"plan up to {step}")
    parts = SimpleNamespace(engine=engine, train=SimpleNamespace(plan=plan))
    meta = {"step": 3, "ledger": "l", "plan": "another"}
    manager = SimpleNamespace(load=lambda folder, tensors: meta)
    with pytest.raises(CheckpointError, match="the data up to step 3 are not those it was trained on"):
        milestones.load(parts, manager, Path("step-3"))  # type: ignore[arg-type]
    assert not adopted
