"""A loader gives each rank its share of any step; together the shares are the step, at every world size."""

import threading
import time

import numpy as np
import pytest
import torch

from sft_dist.data.loader import Loader
from sft_dist.data.plan import PackPlan, build_plan
from sft_dist.data.store import TokenStore, open_store, write_store
from sft_dist.types import PackedBatch, TokenizedExample

SEQ_LEN = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("loader") / "store"
    lengths = random.integers(2, SEQ_LEN, 100)
    examples = [TokenizedExample(random.integers(0, 500, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]
    write_store(folder, examples, {})
    return open_store(folder)


def make_plan(store: TokenStore, packing: str = "best_fit", **changes) -> PackPlan:
    settings = {"micro_batches_per_step": 5, "examples_per_step": None, "epochs": 2, "max_steps": None}
    return build_plan(
        lengths=store.lengths,
        num_loss_tokens=store.num_loss_tokens,
        loss_weight_sums=store.loss_weight_sums,
        seq_len=SEQ_LEN,
        packing=packing,
        packs_per_micro_batch=2,
        seed=0,
        store_fingerprint=store.fingerprint,
        **(settings | changes),
    )


def make_loader(store, plan, rank=0, world_size=1, **more) -> Loader:
    return Loader(
        store,
        plan,
        rank=rank,
        world_size=world_size,
        packing=plan.spec.packing,
        pad_token_id=0,
        pad_to_multiple_of=8,
        **more,
    )


def content(batch: PackedBatch) -> list[list]:
    fields = (batch.input_ids, batch.labels, batch.loss_weights, batch.position_ids, batch.cu_seqlens)
    return [field.tolist() for field in fields if field is not None]


@pytest.mark.parametrize("packing", ["best_fit", "none", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_the_ranks_together_hold_the_step_of_one_rank(store, packing, world_size):
    plan = make_plan(store, packing)
    with make_loader(store, plan) as alone:
        loaders = [make_loader(store, plan, rank, world_size) for rank in range(world_size)]
        for number in range(1, plan.num_steps + 1):
            whole, parts = alone.step(number), [loader.step(number) for loader in loaders]
            assert {len(part.batches) for part in parts} == {-(-len(whole.batches) // world_size)}
            assert {part.digest for part in parts} == {whole.digest}
            assert [part.indices[0] for part in parts] == list(range(world_size))
            by_index = {i: b for part in parts for i, b in zip(part.indices, part.batches, strict=True)}
            assert sorted(by_index) == list(range(len(by_index)))
            in_order = [by_index[index] for index in range(len(by_index))]
            used, filling = in_order[: len(whole.batches)], in_order[len(whole.batches) :]
            assert [content(batch) for batch in used] == [content(batch) for batch in whole.batches]
            assert all(batch.num_tokens == batch.num_loss_tokens == 0 for batch in filling)
            assert sum(batch.num_loss_tokens for batch in in_order) == whole.step.num_loss_tokens
        for loader in loaders:
            loader.close()


def test_steps_in_any_order_equal_steps_built_on_the_spot(store):
    plan = make_plan(store)
    with make_loader(store, plan) as loader:
        for number in [1, 2, 3, plan.num_steps, 5, 6, 6, 2, 3, plan.num_steps]:
            loaded, expected = loader.step(number), loader.build(number)
            assert loaded.step == expected.step and loaded.digest == expected.digest
            assert [content(batch) for batch in loaded.batches] == [content(batch) for batch in expected.batches]


class CountingStore(TokenStore):
    """Knows which examples were verified and read."""

    def __init__(self, store: TokenStore) -> None:
        super().__init__(store.folder, store.corpus)
        self.verified: list[int] = []
        self.read: set[int] = set()

    def verify(self, index):
        self.verified.append(index)
        super().verify(index)

    def token_ids(self, index):
        self.read.add(index)
        return super().token_ids(index)


def test_only_one_rank_reads_what_others_train(store):
    """What a rank reads must not grow with the number of ranks; together they still verify all of a step."""
    plan, whole = make_plan(store), make_loader(store, make_plan(store)).build(1)
    parts = []
    for rank in range(4):
        counting = CountingStore(store)
        with make_loader(counting, plan, rank, 4, reads_all=rank == 0) as loader:
            loaded = loader.build(1)
        own = [
            e for micro_batch in loaded.step.micro_batches[rank::4] for pack in micro_batch for e in pack.example_ids
        ]
        assert loaded.digest == (whole.digest if rank == 0 else "")
        assert sorted(counting.verified) == sorted(examples_of(whole.step) if rank == 0 else own)
        assert counting.read == set(counting.verified)
        parts += own
    assert sorted(parts) == sorted(examples_of(whole.step)) and len(parts) > 8


def examples_of(step) -> list[int]:
    return [example for pack in step.packs for example in pack.example_ids]


def test_the_next_step_is_prepared_in_the_background(store):
    counting = CountingStore(store)
    with make_loader(counting, make_plan(store)) as loader:
        loader.step(1)
        deadline = time.monotonic() + 10
        while not loader._ready.qsize() and time.monotonic() < deadline:
            time.sleep(0.01)
        before = len(counting.verified)
        assert loader._take(2).step.step == 2
        assert len(counting.verified) == before > 0


class BrokenStore(TokenStore):
    """Reading one example fails, as a vanished file system does."""

    bad_example = -1

    def token_ids(self, index):
        if index == self.bad_example:
            raise OSError("stale file handle")
        return super().token_ids(index)


@pytest.fixture
def broken(store) -> BrokenStore:
    return BrokenStore(store.folder, store.corpus)


def test_what_fails_in_the_background_is_raised_at_that_step(store, broken):
    plan = make_plan(store)
    broken.bad_example = plan.step(2).packs[0].example_ids[0]
    with make_loader(broken, plan) as loader:
        loader.step(1)
        for _ in range(2):
            with pytest.raises(OSError, match="stale file handle"):
                loader.step(2)
        assert loader.step(3).step.step == 3


def test_close_ends_the_thread_and_may_be_repeated(store):
    loader = make_loader(store, make_plan(store))
    loader.step(1)
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        loader.step(2)


def test_close_does_not_wait_for_a_read_that_hangs(store, broken, monkeypatch):
    monkeypatch.setattr("sft_dist.data.loader._CLOSE_SECONDS", 0.1)
    plan = make_plan(store)
    loader = make_loader(broken, plan)
    loader.step(1)
    loader._take(2)
    comes_back = threading.Event()
    broken.token_ids = lambda index: comes_back.wait(30)
    loader._ask(2)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5
    assert loader._thread.is_alive()
    comes_back.set()


def test_loading_draws_nothing_from_the_global_random_state(store):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with make_loader(store, make_plan(store)) as loader:
        loader.step(1)
        loader.step(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_steps_beyond_the_plan_are_refused(store):
    plan = make_plan(store)
    with make_loader(store, plan) as loader, pytest.raises(IndexError, match="outside"):
        loader.step(plan.num_steps + 1)
