"""A plan is a pure function: every example once per epoch, any step at any time, nothing about world size."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data import layout
from sft_dist.data import plan as plan_module
from sft_dist.data.loader import dealt
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
def test_several_windows_still_hold_every_example_once(packing):
    plan = make_plan(some_lengths(), packing=packing, epochs=3, window_examples=32)
    steps = list(plan)
    assert len(steps) == plan.num_steps
    for epoch in range(3):
        of_epoch = [step for step in steps if step.epoch == epoch]
        assert sorted(examples_of(of_epoch)) == list(range(200))
        assert sum(len(step.packs) for step in of_epoch) == plan.packs_in_epoch(epoch)
        assert all(len(step.micro_batches) == 3 for step in of_epoch[:-1])


def test_a_step_may_reach_over_several_windows():
    plan = make_plan(some_lengths(), window_examples=8, micro_batches_per_step=20, packs_per_micro_batch=1)
    windows = {place // 8 for place in range(200)}
    assert len(plan.step(1).packs) == 20 > plan.num_packs / len(windows) * 2
    assert sorted(examples_of(step for step in plan if step.epoch == 0)) == list(range(200))


def test_windows_are_packed_on_the_cores_that_this_process_may_use(monkeypatch):
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers):
            asked.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(plan_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(plan_module, "WINDOW_EXAMPLES", 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5})
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    make_plan(some_lengths(), window_examples=8, micro_batches_per_step=20, packs_per_micro_batch=1).step(1)
    assert set(asked) == {2}


def test_threads_that_ask_in_any_order_get_the_same_steps():
    expected = list(make_plan(some_lengths(), window_examples=16, epochs=3))
    plan = make_plan(some_lengths(), window_examples=16, epochs=3)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(expected)), 4)).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda at: plan.step(at + 1), order)) == [expected[at] for at in order]


def test_a_plan_does_not_depend_on_number_types(tmp_path):
    """Two-byte lengths mapped from a file, the lists' own integers: the same steps, the same digest."""
    lengths = some_lengths()
    np.save(tmp_path / "lengths.npy", lengths.astype(np.uint16))
    mapped = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    numbers = {"num_loss_tokens": (lengths - 1).astype(np.uint16), "loss_weight_sums": ((lengths - 1) * 0.5)}
    small, large = make_plan(lengths, lengths=mapped, **numbers), make_plan(lengths)
    assert small.digest == large.digest and list(small) == list(large)


@pytest.mark.parametrize("change", [{}, {"window_examples": 32}, {"packing": "padded"}], ids=str)
def test_offset_tables_can_be_kept_and_given_back(change):
    plan = make_plan(some_lengths(), epochs=3, **change)
    again = make_plan(some_lengths(), epochs=3, tables=plan.to_arrays(), **change)
    assert again.digest == plan.digest and list(again) == list(plan)


@pytest.mark.parametrize("change", [{"window_examples": 64}, {"seq_len": 128}], ids=str)
def test_offset_tables_of_another_plan_are_refused(change):
    tables = make_plan(some_lengths(), window_examples=32).to_arrays()
    with pytest.raises(DataError, match="offset table of epoch 0 belongs to another plan"):
        make_plan(some_lengths(), **({"window_examples": 32} | change), tables=tables)


def test_given_tables_spare_the_pass_over_the_lengths(monkeypatch):
    tables = make_plan(some_lengths(), window_examples=32).to_arrays()
    monkeypatch.setattr("sft_dist.data.plan.count_packs", None)
    assert make_plan(some_lengths(), window_examples=32, tables=tables).num_steps


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


def test_cost_coefficients_decide_who_meets_whom():
    """By tokens alone a full pack of short documents comes first; where squares weigh more, the long document does."""
    lengths = [8] * 8 + [60]
    by_tokens = make_plan(lengths, squared_token_cost=0.0, packs_per_micro_batch=1).step(1).packs
    by_squares = make_plan(lengths, token_cost=0.0, squared_token_cost=2.0, packs_per_micro_batch=1).step(1).packs
    assert [pack.num_tokens for pack in by_tokens] == [64, 60]
    assert [pack.cost for pack in by_tokens] == [64.0, 60.0]
    assert [pack.cost for pack in by_squares] == [2 * 60**2, 2 * 8 * 8**2]


@pytest.mark.parametrize("packing", PACKINGS)
def test_measures_of_much_data_are_estimates_close_to_the_truth(monkeypatch, packing):
    change = {"packing": packing, "window_examples": 256, "packs_per_micro_batch": 8}
    exact = make_plan(some_lengths(40_000), **change)
    assert exact.measured_share == 1.0
    balance, efficiency = exact.balance(3), exact.efficiency
    monkeypatch.setattr("sft_dist.data.plan._EXAMPLES_MEASURED", 8 * 256)
    sampled = make_plan(some_lengths(40_000), **change)
    assert 0.03 < sampled.measured_share < 0.1
    assert sampled.balance(3) == pytest.approx(balance, abs=0.04)
    assert sampled.efficiency == pytest.approx(efficiency, abs=0.01)


def test_balance_is_what_the_steps_say():
    plan = make_plan(some_lengths(), epochs=1)
    for world_size in (1, 2, 3, 5):
        work, waited_for = 0.0, 0.0
        for step in plan:
            costs = [sum(pack.cost for pack in micro_batch) for micro_batch in step.micro_batches]
            work += sum(costs)
            waited_for += sum(max(costs[at : at + world_size]) for at in range(0, len(costs), world_size))
        assert plan.balance(world_size) == pytest.approx(work / waited_for / world_size)


def test_slots_of_padded_rows_are_those_of_the_rectangles():
    plan = make_plan(some_lengths(), packing="padded", packs_per_micro_batch=8, epochs=1)
    rectangles = (rows for step in plan for rows in step.micro_batches)
    assert plan.num_slots == sum(len(rows) * max(row.num_tokens for row in rows) for rows in rectangles)
    assert plan.num_tokens == some_lengths().sum()


@pytest.mark.slow
def test_a_run_killed_ten_thousand_times_under_any_world_size_trains_everything_once():
    """Random (seed, size, world, kill) tuples: whatever a checkpoint covers has been trained once per epoch, in order.

    Each attempt goes on from the last checkpoint with another number of ranks, dealt to as the loader deals;
    steps after the last checkpoint are lost and trained again. What the checkpoints keep must be exactly the plan.
    """
    random = np.random.default_rng(0)
    attempts, case = 0, -1
    while attempts < 10_000:
        case += 1
        num, epochs = int(random.integers(1, 40)), int(random.integers(1, 3))
        lengths = random.integers(2, SEQ_LEN + 1, num)
        changes = {
            "seed": case,
            "epochs": epochs,
            "window_examples": int(random.integers(4, 40)),
            "packing": PACKINGS[case % 3],
            "packs_per_micro_batch": int(random.integers(1, 3)),
            "micro_batches_per_step": int(random.integers(1, 5)),
        }
        kept: list[int] = []
        saved, num_steps = 0, 1  # the step of the last checkpoint
        while saved < num_steps:
            attempts += 1
            plan = make_plan(lengths, **changes)
            num_steps = plan.num_steps
            world_size = int(random.integers(1, 9))
            killed_after = int(random.integers(saved, num_steps + 1))
            checkpoint_at = num_steps if killed_after == num_steps else int(random.integers(saved, killed_after + 1))
            for number in range(saved + 1, checkpoint_at + 1):
                micro_batches = plan.step(number).micro_batches
                shares = [dealt(len(micro_batches), rank, world_size) for rank in range(world_size)]
                assert len({len(share) for share in shares}) == 1, case
                trained = [index for share in shares for index in share if index < len(micro_batches)]
                kept += [row for index in trained for pack in micro_batches[index] for row in pack.example_ids]
            saved = checkpoint_at
        assert np.bincount(kept, minlength=num).tolist() == [epochs] * num, case


@pytest.mark.slow
def test_millions_of_examples_are_planned_in_a_second_and_any_step_found_at_once():
    """0.03 s per million and 10 ms a seek where this was written; the bounds leave room for a busy machine."""
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(400), 1.0, 3_000_000), 2, 8192).astype(np.uint16)
    make_plan(some_lengths(10_000)).step(1)  # compiles
    start = time.perf_counter()
    plan = make_plan(lengths, num_loss_tokens=lengths, loss_weight_sums=lengths, seq_len=8192, epochs=1)
    plan.step(plan.num_steps // 2)
    assert time.perf_counter() - start < 3
    seconds = []
    for number in np.linspace(1, plan.num_steps, 20).astype(int).tolist():
        start = time.perf_counter()
        plan.step(number)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[10] < 0.1


def test_digest_is_golden():
    """It may change only together with the plans themselves: runs cannot be resumed across such a change."""
    plan = make_plan([5, 60, 33, 31, 64, 2, 2, 17])
    assert plan.digest == "d66256bf029bcb145067a83105745bdee915159b2b570fa05ac85d449ead2dd9"


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
        {"window_examples": 64},
        {"token_cost": 2.0},
        {"squared_token_cost": 0.1},
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


def test_planning_little_data_imports_neither_torch_nor_transformers_nor_numba():
    code = """
import sys
import numpy as np
from sft_dist.data.plan import eval_plan
counts = np.full(1000, 7)
plan = eval_plan(lengths=counts, num_loss_tokens=counts, loss_weight_sums=counts, seq_len=64, packing="best_fit",
                 packs_per_micro_batch=1, store_fingerprint="")
assert plan.digest and plan.step(1) and plan.balance(2)
print(sorted({"torch", "transformers", "datasets", "numba"} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
