"""The audit says yes to a true history and names what is wrong with any other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.audit import Audit, as_json, prove
from sft_dist.data.collate import batch_digest
from sft_dist.data.ledger import START, fold
from sft_dist.data.plan import PackPlan, build_plan
from sft_dist.data.store import TokenStore, open_store, write_store
from sft_dist.types import StepPlan, TokenizedExample

NUM = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    draw = np.random.default_rng(0)
    examples = [
        TokenizedExample(draw.integers(0, 99, n).astype(np.int32), np.ones(n, np.float32), "d.jsonl", f"d.jsonl:{i}")
        for i, n in enumerate(draw.integers(2, 30, NUM), 1)
    ]
    folder = tmp_path_factory.mktemp("audit") / "store"
    write_store(folder, examples, {})
    return open_store(folder)


def make_plan(store: TokenStore, **changes: Any) -> PackPlan:
    given = {"packs_per_micro_batch": 1, "micro_batches_per_step": 4, "examples_per_step": None, "seed": 3, "epochs": 3}
    return build_plan(
        lengths=store.lengths,
        num_loss_tokens=store.num_loss_tokens,
        loss_weight_sums=store.loss_weight_sums,
        seq_len=32,
        packing="best_fit",
        store_fingerprint=store.fingerprint,
        **given | {"max_steps": None} | changes,
    )


@pytest.fixture(scope="module")
def plan(store: TokenStore) -> PackPlan:
    return make_plan(store)


def history(plan: PackPlan, store: TokenStore, steps: int) -> tuple[list[dict[str, Any]], dict[int, str | None]]:
    """What a run of so many steps writes: its step lines, and its ledger at every fifth step."""
    lines: list[dict[str, Any]] = []
    ledgers: dict[int, str | None] = {}
    ledger = START
    for number in range(1, steps + 1):
        step = plan.step(number)
        ledger = fold(ledger, step)
        counts = {"num_tokens": step.num_tokens, "num_loss_tokens": step.num_loss_tokens}
        lines.append({"step": number, **counts, "batch_digest": batch_digest(step, store)})
        if number % 5 == 0:
            ledgers[number] = ledger
    return lines, ledgers


def audited(plan: PackPlan, store: TokenStore, steps: int) -> Audit:
    return prove(plan, store, *history(plan, store, steps))


def test_a_whole_run_is_proven(plan, store):
    found = audited(plan, store, plan.num_steps)
    assert not found.faults
    assert [(e.finished, e.trained_once, e.examples) for e in found.epochs] == [(True, NUM, NUM)] * 3
    assert found.tokens == 3 * store.num_tokens
    assert '"proven": true' in as_json(found)


@settings(max_examples=20)
@given(steps=st.integers(0, 40))
def test_a_run_in_progress_is_proven_as_far_as_it_went(plan, store, steps):
    steps = min(steps, plan.num_steps)
    found = audited(plan, store, steps)
    assert not found.faults
    assert sum(epoch.trained_once for epoch in found.epochs if epoch.finished) == NUM * sum(
        epoch.finished for epoch in found.epochs
    )


def test_a_plan_that_ends_inside_an_epoch_is_proven(store):
    whole = make_plan(store)
    plan = make_plan(store, max_steps=whole.steps_per_epoch + 1)
    found = audited(plan, store, plan.num_steps)
    assert not found.faults
    assert [epoch.finished for epoch in found.epochs] == [True, False]


def test_another_ledger_is_named_by_its_checkpoint(plan, store):
    lines, ledgers = history(plan, store, plan.num_steps)
    for wrong in ("0" * 64, None):
        assert prove(plan, store, lines, ledgers | {5: wrong}).faults == (
            "checkpoint of step 5: its ledger differs from the one of the plan",
        )


@pytest.mark.parametrize("key", ["num_tokens", "num_loss_tokens", "batch_digest"])
def test_a_step_that_trained_something_else_is_named(plan, store, key):
    lines, ledgers = history(plan, store, plan.num_steps)
    changed = copy.deepcopy(lines)
    changed[6][key] = lines[7][key] if key == "batch_digest" else lines[6][key] + 1
    (fault,) = prove(plan, store, changed, ledgers).faults
    assert fault.startswith(f"step 7: {key} was ")


def test_a_skipped_and_a_repeated_step_are_named_with_their_examples(plan, store):
    lines, ledgers = history(plan, store, plan.num_steps)
    skipped = prove(plan, store, lines[:2] + lines[3:], {})
    assert skipped.faults[0] == "metrics.jsonl: line 3 of its steps is step 4"
    examples = [e for pack in plan.step(3).packs for e in pack.example_ids]
    assert sorted(skipped.epochs[0].missed) == sorted(examples)
    assert f"epoch 1: {store.example(min(examples)).id} was trained never" in skipped.faults
    repeated = prove(plan, store, [*lines[:3], lines[2], *lines[3:]], ledgers)
    assert sorted(repeated.epochs[0].repeated) == sorted(examples)
    assert any("more than once" in fault for fault in repeated.faults)


def test_a_checkpoint_ahead_of_the_metrics_is_a_fault(plan, store):
    lines, ledgers = history(plan, store, 10)
    assert prove(plan, store, lines[:7], ledgers).faults == ("checkpoint of step 10: metrics.jsonl ends at step 7",)


def test_a_plan_that_loses_or_repeats_an_example_is_caught(plan, store):
    """The audit does not believe the plan either."""

    class Broken:
        num_steps, num_examples, ends_epoch = plan.num_steps, plan.num_examples, plan.ends_epoch

        def step(self, n: int) -> StepPlan:
            step = plan.step(n)
            first = step.micro_batches[0][0]
            swapped = replace(first, example_ids=(0, *first.example_ids[1:]))
            return replace(step, micro_batches=((swapped,), *step.micro_batches[1:])) if n == 2 else step

    found = audited(Broken(), store, plan.num_steps)
    assert len(found.epochs[0].missed) == len(found.epochs[0].repeated) == 1


def test_the_ledger_depends_on_everything_before(plan):
    first, second = plan.step(1), plan.step(2)
    values = {
        fold(START, first),
        fold(START, second),
        fold(fold(START, first), second),
        fold(fold(START, second), first),
        fold(START, replace(first, epoch=1)),
        fold(START, replace(first, step=9)),
    }
    assert len(values) == 6
