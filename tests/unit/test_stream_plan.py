"""Steps from a stream: every example once, however it is chunked, wherever it is resumed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.layout import ExampleNumbers, PlanSpec
from sft_dist.data.stream_plan import StreamPlan, StreamStep
from sft_dist.errors import DataError

SEQ_LEN = 64
WINDOW = 32


def make_spec(**changes) -> PlanSpec:
    settings = {
        "seq_len": SEQ_LEN,
        "packing": "best_fit",
        "packs_per_micro_batch": 2,
        "micro_batches_per_step": 3,
        "examples_per_step": None,
        "seed": 0,
        "epochs": 1,
        "max_steps": None,
        "shuffle": True,
        "store_fingerprint": "",
        "window_examples": WINDOW,
    }
    return PlanSpec(**(settings | changes))


def some_numbers(num: int = 200, seed: int = 0) -> ExampleNumbers:
    lengths = np.random.default_rng(seed).integers(2, SEQ_LEN + 1, num)
    return ExampleNumbers(lengths, lengths - 1, (lengths - 1) * 0.5)


def in_chunks(numbers: ExampleNumbers, *sizes: int) -> list[ExampleNumbers]:
    """Chunks of the given sizes, the last size repeated to the end."""
    chunks, at = [], 0
    while at < len(numbers.lengths):
        size = sizes[min(len(chunks), len(sizes) - 1)]
        chunks.append(numbers.at(slice(at, at + size)))
        at += size
    return chunks


def steps_of(spec: PlanSpec, numbers: ExampleNumbers) -> list[StreamStep]:
    return list(StreamPlan(spec, [numbers]))


def examples_of(steps: list[StreamStep]) -> list[int]:
    return [row for step in steps for pack in step.plan.packs for row in pack.example_ids]


CUTS = [
    {},
    {"packing": "none"},
    {"packing": "padded"},
    {"micro_batches_per_step": None, "examples_per_step": 7},
    {"micro_batches_per_step": 40},
    {"shuffle": False},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@given(num=st.integers(0, 150), seed=st.integers(0, 2**32))
def test_every_example_of_the_stream_exactly_once(cut, num, seed):
    steps = steps_of(make_spec(seed=seed, **cut), some_numbers(num, seed))
    assert sorted(examples_of(steps)) == list(range(num))
    assert [step.plan.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(pack.num_tokens <= SEQ_LEN for step in steps for pack in step.plan.packs)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=5))
def test_steps_do_not_depend_on_how_the_stream_is_chunked(cut, sizes):
    spec, numbers = make_spec(**cut), some_numbers()
    assert list(StreamPlan(spec, in_chunks(numbers, *sizes))) == steps_of(spec, numbers)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_after_any_step_a_stream_goes_on_with_the_very_next(cut):
    spec, numbers = make_spec(**cut), some_numbers()
    whole = steps_of(spec, numbers)
    for done, step in enumerate(whole, start=1):
        rest = numbers.at(slice(step.after.first_example, None))
        assert list(StreamPlan(spec, [rest], after=step.after)) == whole[done:]


def test_only_the_last_step_is_short_and_costs_fall_inside_each():
    steps = steps_of(make_spec(), some_numbers())
    assert {len(step.plan.packs) for step in steps[:-1]} == {6}
    for step in steps:
        costs = [pack.cost for pack in step.plan.packs]
        assert costs == sorted(costs, reverse=True)


def test_examples_move_inside_their_window_only():
    seen = examples_of(steps_of(make_spec(packing="none", packs_per_micro_batch=1), some_numbers(WINDOW * 6)))
    window_of_step = [row // WINDOW for row in seen]
    assert seen != sorted(seen)
    assert all(abs(window - place // WINDOW) <= 1 for place, window in enumerate(window_of_step))


def test_epochs_and_seeds_give_different_orders():
    spec, numbers = make_spec(), some_numbers()
    orders = [
        examples_of(list(StreamPlan(spec, [numbers]))),
        examples_of(list(StreamPlan(spec, [numbers], epoch=1))),
        examples_of(list(StreamPlan(make_spec(seed=1), [numbers]))),
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_max_steps_ends_a_stream_early_and_reads_no_further():
    drawn = []

    def stream():
        for chunk in in_chunks(some_numbers(10_000), WINDOW):
            drawn.append(chunk)
            yield chunk

    assert len(list(StreamPlan(make_spec(max_steps=4), stream()))) == 4
    assert len(drawn) == 2  # 24 packs are in two windows


def test_max_steps_counts_the_steps_before_a_resume():
    spec, numbers = make_spec(max_steps=4), some_numbers()
    third = steps_of(spec, numbers)[2]
    rest = numbers.at(slice(third.after.first_example, None))
    assert [step.plan.step for step in StreamPlan(spec, [rest], after=third.after)] == [4]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("lengths", SEQ_LEN + 1, r"stream example 70 \(65 tokens\): must have 1 to 64 tokens"),
        ("lengths", 0, r"stream example 70 \(0 tokens\): must have 1 to 64"),
        ("num_loss_tokens", 0, "stream example 70 .* has no supervised token"),
    ],
)
def test_impossible_examples_are_refused_by_their_place_in_the_stream(column, value, message):
    numbers = some_numbers()
    getattr(numbers, column)[70] = value
    with pytest.raises(DataError, match=message):
        list(StreamPlan(make_spec(), in_chunks(numbers, 50)))
