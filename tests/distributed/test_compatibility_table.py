"""Each combination that a recipe may ask for takes a step; the page in docs/ is made from the same list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compatibility_table import PAGE, TABLES, cases, cells, name, page, refusal
from harness import run_ranks
from tiny_run import write_recipe

WORKER = Path(__file__).with_name("compatibility_worker.py")
LAUNCHES = 2
CASES = cases()
ARCHITECTURE = {  # with biases, for bitfit
    "model_type": "llama", "attention_bias": True, "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip

Found = dict[str, dict[str, Any]]


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python tests/distributed/compatibility_table.py"


def test_every_refusal_says_what_to_do() -> None:
    refused = [case for _, case in cells() if refusal(case)]
    assert refused, "the offloading of replicas is refused at least"
    for case in refused:
        assert len(str(refusal(case))) > 40 and any(str(value) in str(refusal(case)) for _, value in case), name(case)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each case did, in a few launches of two processes."""
    folder = tmp_path_factory.mktemp("compatibility")
    model = {"config": ARCHITECTURE}
    path = write_recipe(folder, model={"init": "random", "tokenizer": str(folder / "tokenizer")} | model)
    merged: Found = {}
    for number in range(LAUNCHES):
        run_ranks(WORKER, 2, folder, [str(folder), str(path), str(number), str(LAUNCHES)])
        merged |= json.loads((folder / f"found-{number}.json").read_text())
        (folder / "rendezvous-2").unlink(missing_ok=True)
    return merged


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_combination_that_is_not_refused_takes_a_step(found: Found, case: Any) -> None:
    """All in fp32 on the same batch: before the first update the loss is that of the method, whatever the engine."""
    result = found[name(case)]
    assert "error" not in result, result
    values = dict(case)
    method = values.get("tuning.method", "full")
    if values.get("precision.compute", "float32") == "float32" and values.get("data.packing", "best_fit") == "best_fit":
        reference = found[name((("parallel.strategy", "ddp"), ("tuning.method", method)))]
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    if CASES[case]:
        assert "logits bit for bit" in result["export"]


def test_each_table_has_something_to_say() -> None:
    for table in TABLES:
        assert len(table.row[1]) * len(table.column[1]) > 1, table.title
