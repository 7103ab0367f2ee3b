"""Every combination in the table is refused in one line that says why; its neighbours are not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sft_dist.config import keys
from sft_dist.config.auto import Facts, choose
from sft_dist.config.compatibility import GIVEN, REFUSED, Row, refusal
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

EXAMPLES = {  # values for rows that ask for any
    "optim.lora_plus_ratio": 16.0,
    "optim.neftune_alpha": 5.0,
    "parallel.dp_replicate": 2,
    "parallel.sequence": 2,
    "resilience.audit_every": 50,
}
NEEDED = {"precision.stochastic_rounding": {"precision.master": "bfloat16", "precision.compute": "bfloat16"}}


def recipe(settings: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}}
    for key, value in settings.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return Recipe.model_validate(tree)


def settings(row: Row, pick: int) -> dict[str, Any]:
    """A recipe that meets `row`, with the `pick`-th of each key's values."""
    found = {}
    for key, values in row.when.items():
        value = values[pick % len(values)]
        found |= NEEDED.get(key, {}) | {key: EXAMPLES[key] if value == GIVEN else value}
    return found


CASES = [(row, pick) for row in REFUSED for pick in range(max(map(len, row.when.values())))]


@pytest.mark.parametrize(("row", "pick"), CASES, ids=[f"{'+'.join(row.when)}-{pick}" for row, pick in CASES])
def test_each_row_is_refused_and_says_why(row: Row, pick: int) -> None:
    asked = settings(row, pick)
    with pytest.raises(ValidationError) as caught:
        recipe(asked)
    line = str(caught.value)
    assert row.reason in line and row.remedy in line and row.upstream in line
    assert all(f"{key}={asked[key]}" in line for key in row.when)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: "+".join(row.when))
def test_without_one_of_its_keys_it_is_not(row: Row) -> None:
    asked = settings(row, 0)
    for key in row.when:
        recipe({"tuning.method": "lora"} | {name: value for name, value in asked.items() if name != key})


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: "+".join(row.when))
def test_rows_speak_of_keys_that_exist(row: Row) -> None:
    assert all(keys.find(key) for key in row.when)
    assert len(row.when) == 2 and row.reason and row.remedy


def test_what_auto_chose_is_asked_too() -> None:
    facts = Facts(1000, 1000, 8, 2, 10_000, 100, world_size=2, device="cpu", memory_bytes=2**30)
    asked = recipe({"optim.name": "muon", "parallel.offload": "optimizer"})
    assert refusal(asked) is None
    with pytest.raises(ConfigError, match=r"optim\.name=muon with parallel\.strategy=zero2.*DeepSpeed#7509"):
        choose(asked, facts)
