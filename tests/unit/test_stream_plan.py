"""Steps from a stream: every example once in a pass, any step at any time, whatever the stream's pieces are."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.layout import ExampleNumbers, PlanSpec
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.errors import DataError
from sft_dist.types import StepPlan

SEQ_LEN = 64
WINDOW = 32


class Held:
    """A stream of examples that are all there; remembers how far it was read."""

    fingerprint = ""

    def __init__(self, numbers: ExampleNumbers) -> None:
        self._numbers, self.read = numbers, 0

    def numbers(self, first: int, last: int) -> ExampleNumbers:
        self.read = max(self.read, last)
        return self._numbers.at(slice(first, last))

    def digest_up_to(self, example: int) -> str:
        return str(self._numbers.lengths[:example].tolist())


def make_spec(**changes) -> PlanSpec:
    settings = {
        "seq_len": SEQ_LEN,
        "packing": "best_fit",
        "packs_per_micro_batch": 2,
        "micro_batches_per_step": 3,
        "examples_per_step": None,
        "seed": 0,
        "epochs": 1,
        "max_steps": 1000,
        "shuffle": True,
        "store_fingerprint": "",
        "window_examples": WINDOW,
    }
    return PlanSpec(**(settings | changes))


def some_numbers(num: int = 200, seed: int = 0) -> ExampleNumbers:
    lengths = np.random.default_rng(seed).integers(2, SEQ_LEN + 1, num)
    return ExampleNumbers(lengths, lengths - 1, (lengths - 1) * 0.5)


def passes(plan: StreamPlan) -> Iterator[list[StepPlan]]:
    """The steps of one pass after another."""
    steps: list[StepPlan] = []
    for n in range(1, plan.num_steps + 1):
        step = plan.step(n)
        if steps and step.epoch != steps[-1].epoch:
            yield steps
            steps = []
        steps.append(step)


def one_pass(spec: PlanSpec, numbers: ExampleNumbers) -> list[StepPlan]:
    return next(passes(StreamPlan(spec, Held(numbers))))


def examples_of(steps: list[StepPlan]) -> list[int]:
    return [row for step in steps for pack in step.packs for row in pack.example_ids]


CUTS = [
    {},
    {"packing": "none"},
    {"packing": "padded"},
    {"micro_batches_per_step": None, "examples_per_step": 7},
    {"micro_batches_per_step": 40},
    {"shuffle": False},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@given(num=st.integers(1, 150), seed=st.integers(0, 2**32))
def test_every_example_exactly_once_in_each_pass(cut, num, seed):
    two = passes(StreamPlan(make_spec(seed=seed, **cut), Held(some_numbers(num, seed))))
    for epoch, steps in enumerate([next(two), next(two)]):
        assert sorted(examples_of(steps)) == list(range(num))
        assert {step.epoch for step in steps} == {epoch}
        assert all(pack.num_tokens <= SEQ_LEN for step in steps for pack in step.packs)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@given(order=st.permutations(range(1, 60)))
def test_any_step_at_any_time(cut, order):
    spec, numbers = make_spec(**cut), some_numbers()
    expected = StreamPlan(spec, Held(numbers))
    plan = StreamPlan(spec, Held(numbers))
    for n in order[:6]:
        assert plan.step(n) == expected.step(n)
        assert plan.step(n).step == n
        assert plan.digest_up_to(n) == expected.digest_up_to(n)


def test_only_the_last_step_of_a_pass_is_short_and_costs_fall_inside_each():
    steps = one_pass(make_spec(), some_numbers())
    assert {len(step.packs) for step in steps[:-1]} == {6}
    for step in steps:
        costs = [pack.cost for pack in step.packs]
        assert costs == sorted(costs, reverse=True)


def test_examples_move_inside_their_window_only():
    seen = examples_of(one_pass(make_spec(packing="none", packs_per_micro_batch=1), some_numbers(WINDOW * 6)))
    window_of_step = [row // WINDOW for row in seen]
    assert seen != sorted(seen)
    assert all(abs(window - place // WINDOW) <= 1 for place, window in enumerate(window_of_step))


def test_passes_and_seeds_give_different_orders():
    first = passes(StreamPlan(make_spec(), Held(some_numbers())))
    other = one_pass(make_spec(seed=1), some_numbers())
    orders = [examples_of(next(first)), examples_of(next(first)), examples_of(other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_stream_is_read_as_far_as_its_steps_reach():
    stream = Held(some_numbers(10_000))
    plan = StreamPlan(make_spec(max_steps=4), stream)
    plan.step(4)
    assert stream.read == 2 * WINDOW  # 24 packs are in two windows
    with pytest.raises(IndexError):
        plan.step(5)


def test_the_end_of_a_pass_is_known_once_it_was_seen():
    plan = StreamPlan(make_spec(), Held(some_numbers()))
    num = len(one_pass(make_spec(), some_numbers()))
    assert [plan.ends_epoch(n) for n in range(1, 2 * num + 1)] == ([False] * (num - 1) + [True]) * 2


def test_the_digest_covers_what_was_trained_and_grows_with_the_windows():
    changed = some_numbers()
    changed.lengths[-1] -= 1
    old, new = (StreamPlan(make_spec(), Held(numbers)) for numbers in (some_numbers(), changed))
    last = len(one_pass(make_spec(), some_numbers()))
    assert old.digest_up_to(1) == new.digest_up_to(1) != old.digest_up_to(last)
    assert old.digest_up_to(last) != new.digest_up_to(last)
    assert old.digest_up_to(1) != StreamPlan(make_spec(seed=1), Held(some_numbers())).digest_up_to(1)


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(DataError, match="ended without an example"):
        StreamPlan(make_spec(), Held(some_numbers(0))).step(1)


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
        list(passes(StreamPlan(make_spec(), Held(numbers))))
