"""Real runs on 2 or 4 ranks whose numbers go wrong on one of them: `python wrong_numbers.py FOLDER GROUP`.

Each life patches gradients, weights, losses or the forward pass of rank 1 at chosen steps and must end with the code of
it. What rank 0 printed goes to FOLDER/printed.json, by life; the run folders are there to look into.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
from lives import run_life
from nursery import import_libraries
from tiny_run import write_recipe
from torch import Tensor

from sft_dist import train, worker
from sft_dist.data.loader import LoadedStep
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.engine import local_part as local

SKIP = {"resilience": {"nonfinite": "skip"}}
LORA = {"tuning": {"method": "lora", "rank": 3}}
LAYER = "model.layers.1.mlp.up_proj"
AUDIT = {"resilience": {"audit_every": 2}}
Patch = Callable[[], None]


def under(strategy: str, **more: Any) -> dict[str, Any]:
    return {"parallel": {"strategy": strategy}, **more}


fsdp = partial(under, "fsdp2")


def untouched() -> None:
    """No fault."""


def poison(steps: tuple[int, ...], times: int = 99) -> None:
    """A gradient of rank 1 becomes infinite in `steps`, the first `times` times it is computed."""
    original, left = train.sum_gradients, dict.fromkeys(steps, times)

    def poisoned(engine: Engine, loaded: LoadedStep, seed: int, device: torch.device) -> Tensor:
        losses = original(engine, loaded, seed, device)
        number = loaded.step.step
        if left.get(number, 0):
            left[number] -= 1
            if os.environ["RANK"] == "1":
                next(piece for piece in pieces(engine) if piece.numel()).flatten()[0] = float("inf")
        return losses

    train.sum_gradients = poisoned


def mislead(step: int, passes: tuple[tuple[int, float], ...]) -> None:
    """In `step` the loss of the micro-batch of one rank becomes no number: (rank, value) for each pass over it."""
    original, left = train.sum_gradients, list(passes)

    def misled(engine: Engine, loaded: LoadedStep, seed: int, device: torch.device) -> Tensor:
        losses = original(engine, loaded, seed, device)
        if loaded.step.step == step:
            rank, value = left.pop(0)
            if os.environ["RANK"] == str(rank):
                losses[loaded.indices[0]] = value
        return losses

    train.sum_gradients = misled


def overflow(step: int, layer: str) -> None:
    """In `step` a layer of rank 1 gives infinities."""
    original = train.sum_gradients

    def overflowing(engine: Engine, loaded: LoadedStep, seed: int, device: torch.device) -> Tensor:
        if loaded.step.step != step or os.environ["RANK"] != "1":
            return original(engine, loaded, seed, device)
        module = engine.model.get_submodule(layer)
        with module.register_forward_hook(lambda module, given, output: output / 0, prepend=True):
            return original(engine, loaded, seed, device)

    train.sum_gradients = overflowing


def pieces(engine: Engine) -> list[Tensor]:
    """What this rank holds of the summed gradients."""
    if engine.name.startswith("zero"):
        return list(engine.optimizer.averaged_gradients[0])  # type: ignore[attr-defined]
    return [local(p.grad) for p in engine.trained.values() if p.grad is not None]


def flip(step: int, trained: bool) -> None:
    """One exponent bit of a weight of rank 1 falls over before the audit of `step`."""
    original = train.audit

    def audit_later(engine: Engine, started: Any, batch: Any, number: int) -> None:
        if number == step and os.environ["RANK"] == "1":
            weights = [local(p.data) for p in engine.model.parameters() if p.requires_grad == trained and p.ndim == 2]
            weight = next(w for w in weights if w.numel())
            weight.flatten().view(torch.int32)[0] ^= 1 << 24
        original(engine, started, batch, number)

    train.audit = audit_later


def miscompute(step: int) -> None:
    """Rank 1 computes every other audited loss a bit too high."""
    original = train.audit

    def audit_wrongly(engine: Engine, started: Any, batch: Any, number: int) -> None:
        if number == step and os.environ["RANK"] == "1":
            engine.packed.register_forward_hook(lambda module, given, result: result * (1 + 1e-6))
        original(engine, started, batch, number)

    train.audit = audit_wrongly


# name: (changes of the recipe, settings, what goes wrong, exit code)
LIVES: dict[str, tuple[dict[str, Any], list[str], Patch, int]] = {
    "stop": (fsdp(), ["checkpoint.every_steps=4", "checkpoint.async=true"], partial(poison, (5,)), 70),
    "stop-ddp": (LORA, [], partial(poison, (5,)), 70),
    "layer": (fsdp(), [], partial(overflow, 5, LAYER), 70),
    "layer-recomputed": ({"memory": {"activation_checkpointing": "selective"}}, [], partial(overflow, 5, LAYER), 70),
    "layer-zero3": (under("zero3"), [], partial(overflow, 5, LAYER), 70),
    "another-value": (fsdp(), [], partial(mislead, 5, ((1, nan), (1, inf))), 77),
    "another-rank": ({}, [], partial(mislead, 5, ((1, nan), (0, nan))), 77),
    "once": (fsdp(), [], partial(poison, (5,), times=1), 77),
    "skip": (fsdp(**SKIP), [], partial(poison, (5, 8)), 0),
    "skip-first": (fsdp(**SKIP), ["optim.stop_after_step=6"], partial(poison, (5, 8)), 0),
    "skip-then": (fsdp(**SKIP), [], partial(poison, (5, 8)), 0),
    "skip-zero3": (under("zero3", **SKIP), [], partial(poison, (5, 8)), 0),
    "skip-zero3-first": (under("zero3", **SKIP), ["optim.stop_after_step=6"], partial(poison, (5, 8)), 0),
    "skip-zero3-then": (under("zero3", **SKIP), [], partial(poison, (5, 8)), 0),
    "once-zero3": (under("zero3"), [], partial(poison, (5,), times=1), 77),
    "in-a-row": (SKIP, [], partial(poison, (5, 6, 7, 8)), 70),
    "three": (SKIP, ["optim.max_steps=9"], partial(poison, (5, 6, 7)), 0),
    "audited": (AUDIT, [], untouched, 0),
    "flipped": (AUDIT, [], partial(flip, 4, trained=True), 77),
    "frozen": (fsdp(**LORA, **AUDIT), [], partial(flip, 4, trained=False), 77),
    "computed": (fsdp(**AUDIT), [], partial(miscompute, 6), 77),
}
LIVES_OF_ZERO: dict[str, tuple[dict[str, Any], list[str], Patch, int]] = {
    "skip-zero1": (under("zero1", **SKIP), [], partial(poison, (5, 8)), 0),
    "skip-zero1-first": (under("zero1", **SKIP), ["optim.stop_after_step=6"], partial(poison, (5, 8)), 0),
    "skip-zero1-then": (under("zero1", **SKIP), [], partial(poison, (5, 8)), 0),
    "skip-zero2": (under("zero2", **SKIP), [], partial(poison, (5, 8)), 0),
    "skip-zero2-first": (under("zero2", **SKIP), ["optim.stop_after_step=6"], partial(poison, (5, 8)), 0),
    "skip-zero2-then": (under("zero2", **SKIP), [], partial(poison, (5, 8)), 0),
}
# Two replicas of two shards. Rank 1 is poisoned, and rank 3, which holds the same shard of the other replica, is not.
HSDP = {"parallel": {"dp_replicate": 2}, "batch": {"tokens_per_step": 2048}}
LIVES_OF_FOUR: dict[str, tuple[dict[str, Any], list[str], Patch, int]] = {
    "skip-hsdp": ({**HSDP, **SKIP}, [], partial(poison, (5, 8)), 0),
    "skip-hsdp-first": ({**HSDP, **SKIP}, ["optim.stop_after_step=6"], partial(poison, (5, 8)), 0),
    "skip-hsdp-then": ({**HSDP, **SKIP}, [], partial(poison, (5, 8)), 0),
    "stop-hsdp": (HSDP, [], partial(poison, (5,)), 70),
    "once-hsdp": (HSDP, [], partial(poison, (5,), times=1), 77),
}

GROUPS = {"two": (2, LIVES), "zero": (2, LIVES_OF_ZERO), "hsdp": (4, LIVES_OF_FOUR)}


def folder_of(name: str) -> str:
    """The run of a life: `-first` and `-then` are two of one."""
    stem = name.removesuffix("-first").removesuffix("-then")
    return name if stem == name else f"{stem}-continued"


def live(patch: Patch, words: list[str]) -> int:
    patch()
    return worker.main(words)


if __name__ == "__main__":
    import_libraries()
    place, (num_ranks, lives), printed = Path(sys.argv[1]), GROUPS[sys.argv[2]], {}
    for name, (changes, settings, patch, code) in lives.items():
        shared: dict[str, Any] = {"eval": {"generate": 0, "every_steps": 6}, "checkpoint": {"every_steps": 3}}
        recipe = write_recipe(place, folder_of(name), **shared, **changes)
        printed[name] = run_life(f"out-{name}", num_ranks, partial(live, patch, [str(recipe), *settings]), place, code)
    (place / "printed.json").write_text(json.dumps(printed))
