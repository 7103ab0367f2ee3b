"""A plan is a pure function: every example once per epoch, any step at any time, nothing about world size."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data import layout
from sft_dist.data.plan import PackPlan, build_plan, eval_plan
from sft_dist.errors import DataError

SEQ_LEN = 64
PACKINGS = ["best_fit", "none", "padded"]


def make_plan(lengths, /, **changes) -> PackPlan:
    lengths = np.asarray(lengths, dtype=np.int32)
    settings = {
        "lengths": lengths,
        "num_loss_tokens": lengths - 1,
        "loss_weight_sums": (lengths - 1) * 0.5,
        "seq_len": SEQ_LEN,
        "packing": "best_fit",
        "packs_per_micro_batch": 2,
        "micro_batches_per_step": 3,
        "examples_per_step": None,
        "seed": 0,
        "epochs": 2,
        "max_steps": None,
        "store_fingerprint": "abc",
    }
    return build_plan(**(settings | changes))


def some_lengths(num: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, SEQ_LEN + 1, num)


def examples_of(steps) -> list[int]:
    return [example for step in steps for pack in step.packs for example in pack.example_ids]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("cut", [{}, {"micro_batches_per_step": None, "examples_per_step": 7}], ids=["packs", "rows"])
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(2, SEQ_LEN), min_size=1, max_size=150), seed=st.integers(0, 2**63 - 1))
def test_every_example_exactly_once_per_epoch(packing, cut, lengths, seed):
    plan = make_plan(lengths, packing=packing, seed=seed, **cut)
    for epoch in range(2):
        steps = [step for step in plan if step.epoch == epoch]
        assert sorted(examples_of(steps)) == list(range(len(lengths)))
        assert all(pack.num_tokens <= SEQ_LEN for step in steps for pack in step.packs)


@pytest.mark.parametrize("packing", PACKINGS)
def test_several_windows_still_hold_every_example_once(monkeypatch, packing):
    monkeypatch.setattr(layout, "WINDOW_EXAMPLES", 32)
    monkeypatch.setattr("sft_dist.data.plan.WINDOW_EXAMPLES", 32)
    plan = make_plan(some_lengths(), packing=packing, epochs=3)
    steps = list(plan)
    assert len(steps) == plan.num_steps
    for epoch in range(3):
        assert sorted(examples_of(step for step in steps if step.epoch == epoch)) == list(range(200))


def test_epochs_and_seeds_give_different_orders():
    first, second = make_plan(some_lengths()), make_plan(some_lengths(), seed=1)
    by_epoch = [examples_of(step for step in first if step.epoch == epoch) for epoch in range(2)]
    assert by_epoch[0] != by_epoch[1]
    assert examples_of(first) != examples_of(second)


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_step_alone_equals_the_same_step_of_a_whole_pass(packing):
    whole = list(make_plan(some_lengths(), packing=packing, epochs=4))
    for number in (len(whole), 1, len(whole) // 2, 2):
        assert make_plan(some_lengths(), packing=packing, epochs=4).step(number) == whole[number - 1]


def test_steps_hold_what_was_asked_for_and_only_the_last_is_short():
    plan = make_plan(some_lengths())
    full = [len(step.micro_batches) == 3 and len(step.packs) == 6 for step in plan]
    ends = [number % plan.steps_per_epoch == 0 for number in range(1, plan.num_steps + 1)]
    assert all(is_full or is_end for is_full, is_end in zip(full, ends, strict=True))
    assert all(step.num_loss_tokens > 0 and step.micro_batches for step in plan)


def test_examples_per_step_never_borrows_from_a_neighbour():
    """Step k holds the examples k*7..k*7+6 of the shuffled order, however they pack."""
    plans = [
        make_plan(some_lengths(50), micro_batches_per_step=None, examples_per_step=7, packing=packing, epochs=1)
        for packing in PACKINGS
    ]
    members = [[sorted(examples_of([step])) for step in plan] for plan in plans]
    assert members[0] == members[1] == members[2]
    assert [len(step) for step in members[0]] == [7] * 7 + [1]


def test_counts_of_a_pack_are_sums_over_its_examples():
    lengths = some_lengths()
    for step in make_plan(lengths):
        for pack in step.packs:
            of_pack = lengths[list(pack.example_ids)]
            assert pack.num_tokens == of_pack.sum()
            assert pack.num_loss_tokens == (of_pack - 1).sum()
            assert pack.loss_weight_sum == (of_pack - 1).sum() * 0.5


def test_costs_fall_within_a_step():
    plan = make_plan(some_lengths(), packing="none")
    assert all(one.cost >= other.cost for step in plan for one, other in pairwise(step.packs))


def test_max_steps_overrides_epochs_and_goes_on_over_further_epochs():
    plan = make_plan(some_lengths(), max_steps=100)
    steps = list(plan)
    assert len(plan) == len(steps) == plan.num_steps == 100
    assert [step.step for step in steps] == list(range(1, 101))
    assert steps[-1].epoch == 99 // plan.steps_per_epoch > 1
    assert make_plan(some_lengths(), max_steps=3).num_steps == 3


def test_steps_outside_the_plan_are_refused():
    plan = make_plan(some_lengths())
    for number in (0, plan.num_steps + 1):
        with pytest.raises(IndexError, match=r"outside 1\.\."):
            plan.step(number)


def test_padded_micro_batches_are_rows_of_like_length():
    plan = make_plan(some_lengths(2000), packing="padded", packs_per_micro_batch=8)
    assert plan.efficiency > 0.95
    unsorted = sum(some_lengths(2000)) / (2000 * SEQ_LEN)
    assert unsorted < 0.6


def test_efficiency_counts_capacity_for_packs_and_nothing_for_single_documents():
    lengths = [40, 24, 64, 32, 32]
    assert make_plan(lengths).efficiency == 1.0
    assert make_plan([40, 40]).efficiency == 80 / 128
    assert make_plan([40, 40], packing="none").efficiency == 1.0


def test_realistic_mix_is_packed_to_over_99_percent():
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(400), 1.0, 10_000), 2, 2048).astype(np.int32)
    assert make_plan(lengths, seq_len=2048).efficiency >= 0.99


def test_sorting_by_cost_balances_the_rounds():
    """Rounds of two micro-batches of very uneven documents: neighbours of a sorted step cost nearly the same."""
    lengths = np.random.default_rng(3).integers(2, 4096, 2000)
    plan = make_plan(lengths, seq_len=4096, packing="none", packs_per_micro_batch=1, micro_batches_per_step=32)
    pairs = lengths[: len(lengths) // 2 * 2].reshape(-1, 2)
    unsorted = pairs.sum() / (2 * pairs.max(axis=1).sum())
    assert plan.balance(1) == pytest.approx(1.0)
    assert plan.balance(2) > 0.95 > 0.8 > unsorted


def test_digest_is_golden():
    """It may change only together with the plans themselves: runs cannot be resumed across such a change."""
    plan = make_plan([5, 60, 33, 31, 64, 2, 2, 17])
    assert plan.digest == "7bc4ae85422fc2ca55afe87e1bd1ab04207ab402d5ed8e1c78679d2447a7b578"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"seq_len": 65},
        {"packing": "none"},
        {"micro_batches_per_step": 4},
        {"packs_per_micro_batch": 3},
        {"epochs": 3},
        {"max_steps": 5},
        {"shuffle": False},
        {"store_fingerprint": "abd"},
        {"lengths": some_lengths(200, 1)},
        {"loss_weight_sums": np.ones(200)},
        {"num_loss_tokens": np.ones(200, int)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_sees_every_input(change):
    assert make_plan(some_lengths(), **change).digest != make_plan(some_lengths()).digest


def test_digest_sees_the_packing_code(monkeypatch):
    before = make_plan(some_lengths()).digest
    monkeypatch.setitem(layout.PACKINGS, "best_fit", layout.PACKINGS["none"])
    assert make_plan(some_lengths()).digest != before


def test_eval_plan_is_one_pass_in_order():
    lengths = some_lengths(30)
    numbers = {"lengths": lengths, "num_loss_tokens": lengths - 1, "loss_weight_sums": lengths - 1.0}
    plan = eval_plan(**numbers, seq_len=SEQ_LEN, packing="none", packs_per_micro_batch=30, store_fingerprint="abc")
    assert plan.num_steps == 1
    assert sorted(examples_of(plan)) == list(range(30))
    assert plan.step(1).packs == tuple(sorted(plan.step(1).packs, key=lambda pack: -pack.cost))


def test_no_examples_is_a_data_error():
    with pytest.raises(DataError, match="0 examples"):
        make_plan([])


def test_an_example_without_targets_is_refused():
    with pytest.raises(DataError, match="example 1 has no supervised token"):
        make_plan([5, 5], num_loss_tokens=[4, 0])


@pytest.mark.parametrize(
    "change", [{"packing": "greedy"}, {"examples_per_step": 4}, {"micro_batches_per_step": None}], ids=str
)
def test_contradictions_are_refused(change):
    with pytest.raises(ValueError):
        make_plan([5], **change)


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys, sft_dist.data.plan; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
