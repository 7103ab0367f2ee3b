"""Step 0: what is rehearsed, what gives way when memory runs out, and that nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import environment, write_recipe

from sft_dist.config.auto import Choices
from sft_dist.config.loader import load_recipe
from sft_dist.data.plan import build_plan
from sft_dist.errors import ConfigError
from sft_dist.inputs import read_inputs
from sft_dist.parallel.runtime import runtime
from sft_dist.parts import Parts, build_parts
from sft_dist.rehearsal import back_off, fit, is_out_of_memory, rehearse, worst_micro_batch

CHOSEN = Choices(4, 6, 1e-3, "ddp", "none", "float32")


@pytest.mark.parametrize("packing", ["best_fit", "none", "padded"])
def test_the_worst_micro_batch_is_the_fullest_of_the_plan(packing: str) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 200)
    lengths[137] = 64
    plan = build_plan(
        lengths=lengths, num_loss_tokens=lengths // 2, loss_weight_sums=(lengths // 2).astype(float), seq_len=64,
        packing=packing, packs_per_micro_batch=2, micro_batches_per_step=3, examples_per_step=None, seed=1, epochs=2,
        max_steps=None, store_fingerprint="x",
    )  # fmt: skip
    worst = worst_micro_batch(plan)

    def slots(packs: Any) -> int:
        sizes = [pack.num_tokens for pack in packs]
        return len(sizes) * max(sizes) if packing == "padded" else sum(sizes)

    assert slots(worst) == max(slots(packs) for step in plan for packs in step.micro_batches)


def test_backing_off_keeps_the_packs_of_a_step_and_ends() -> None:
    found, seen = CHOSEN, []
    while (smaller := back_off(found, may_change_plan=True)) is not None:
        found = smaller
        seen.append((found.packs_per_micro_batch, found.micro_batches_per_step, found.activation_checkpointing))
    assert seen == [(2, 12, "none"), (1, 24, "none"), (1, 24, "full")]
    assert back_off(replace(CHOSEN, packs_per_micro_batch=9), may_change_plan=True).packs_per_micro_batch == 3  # type: ignore[union-attr]
    by_examples = back_off(replace(CHOSEN, micro_batches_per_step=None), may_change_plan=True)
    assert by_examples is not None and by_examples.micro_batches_per_step is None


def test_a_resumed_run_keeps_its_plan() -> None:
    assert back_off(CHOSEN, may_change_plan=False) == replace(CHOSEN, activation_checkpointing="full")
    assert back_off(replace(CHOSEN, activation_checkpointing="full"), may_change_plan=False) is None


def test_only_memory_errors_are_memory_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape '[3]' is invalid for input of size 4"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@contextmanager
def builder(tmp_path: Path, limit: int | None, needs_checkpointing: bool = False, **sections: Any) -> Iterator[Any]:
    """`build` for `fit`, of a real run whose allocator has no room for micro-batches of more than `limit` tokens."""
    recipe = load_recipe([str(write_recipe(tmp_path, **sections))], [])
    with runtime() as place:
        inputs = read_inputs(recipe, lambda _: None)

        def build(chosen: Choices | None) -> Parts:
            parts = build_parts(inputs, place, tmp_path / "run", chosen)
            checkpointing = parts.choices.activation_checkpointing == "full"
            forward = parts.engine.forward

            def limited(batch: Any) -> torch.Tensor:
                too_much = limit is not None and batch.num_tokens > limit
                if too_much or (needs_checkpointing and not checkpointing):
                    raise torch.OutOfMemoryError(f"no room for {batch.num_tokens} tokens")
                return forward(batch)

            return replace(parts, engine=replace(parts.engine, forward=limited))

        yield build


FOUR = {"batch": {"tokens_per_micro_batch": 2048, "tokens_per_step": 4096}}


def test_it_fits_with_the_same_global_batches(tmp_path: Path) -> None:
    said: list[str] = []
    with builder(tmp_path, 600, **FOUR) as build:
        wanted = build(None)
        before = [sorted(pack.example_ids for pack in step.packs) for step in wanted.train.plan]
        wanted.close()
        fitted = fit(build, resumed=False, say=said.append)
        after = [sorted(pack.example_ids for pack in step.packs) for step in fitted.parts.train.plan]
        fitted.parts.close()
    assert fitted.parts.choices.packs_per_micro_batch == 1 and fitted.parts.choices.micro_batches_per_step == 8
    assert fitted.parts.fingerprint["choices"]["packs_per_micro_batch"] == 1
    assert before == after
    assert len(said) == 2 and "4 -> 2 pack(s)" in said[0] and "2 -> 1 pack(s)" in said[1]
    assert "2 -> 1 pack(s) per micro-batch" in fitted.told


def test_checkpointing_is_the_last_thing_tried_and_then_it_is_refused(tmp_path: Path) -> None:
    with builder(tmp_path, None, needs_checkpointing=True) as build:
        fitted = fit(build, resumed=False, say=lambda _: None)
        fitted.parts.close()
    assert fitted.parts.choices.activation_checkpointing == "full"
    assert "activation checkpointing none -> full" in fitted.told
    with builder(tmp_path, 1) as build, pytest.raises(ConfigError, match="out of memory: one micro-batch of"):
        fit(build, resumed=False, say=lambda _: None)


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    with builder(tmp_path, None) as build:

        def broken(chosen: Choices | None) -> Parts:
            parts = build(chosen)
            return replace(parts, engine=replace(parts.engine, forward=lambda batch: batch.nonsense))

        with pytest.raises(AttributeError, match="nonsense"):
            fit(broken, resumed=False, say=lambda _: None)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with builder(tmp_path, None, tuning={"method": "lora", "rank": 2, "dropout": 0.1}) as build:
        parts = build(None)
        before = {name: tensor.clone() for name, tensor in parts.engine.state().items()}
        random = torch.get_rng_state()
        rehearse(parts, worst_micro_batch(parts.train.plan))
        parts.close()
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in parts.engine.state().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in parts.engine.trained.values())


SCRIPT = """
import json, resource, sys
from functools import partial
from pathlib import Path
import torch
from sft_dist.config.loader import load_recipe
from sft_dist.parallel.runtime import runtime
from sft_dist.inputs import read_inputs
from sft_dist.parts import build_parts
from sft_dist.rehearsal import fit

recipe, run_dir, room = load_recipe([sys.argv[1]], []), Path(sys.argv[2]), int(sys.argv[3]) * 2**20
with runtime() as place:
    torch.set_num_threads(1)
    inputs = read_inputs(recipe, lambda _: None)
    build_parts(inputs, place, run_dir).close()  # what is imported and mapped on the way
    used = next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if "VmData" in l)
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
    said = []
    fitted = fit(partial(build_parts, inputs, place, run_dir), resumed=False, say=said.append)
    print(json.dumps({"said": said, "packs": fitted.parts.choices.packs_per_micro_batch}))
    fitted.parts.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("room_mib", "packs"), [(4000, 16), (150, None)])
def test_a_real_allocator_that_has_no_more(tmp_path: Path, room_mib: int, packs: int | None) -> None:
    """The process may not grow by more than `room_mib`: the kernel refuses, PyTorch's CPU allocator raises."""
    wide = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8}
    path = write_recipe(tmp_path, batch={"tokens_per_micro_batch": 8192, "tokens_per_step": 16384}, optim={"epochs": 9})
    recipe = json.loads(path.read_text())
    recipe["model"]["config"] |= wide
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "run"), str(room_mib)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if packs is None:
        assert found["packs"] < 16 and found["said"][0].startswith("out of memory in a micro-batch of")
    else:
        assert found == {"said": [], "packs": packs}
