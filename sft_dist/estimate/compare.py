"""Every strategy for a recipe on given devices, the one to take with its reason, and what would fit when none does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sft_dist.config.auto import Choices, Facts, choose, refuse_uneven
from sft_dist.config.schema import Recipe
from sft_dist.estimate.architecture import Architecture, read
from sft_dist.estimate.hardware import GIB, Device
from sft_dist.estimate.layout import STRATEGIES, Layout
from sft_dist.estimate.memory import Memory, checkpoint_bytes, memory
from sft_dist.estimate.pace import step_seconds
from sft_dist.estimate.tuning import Tuned, tuned
from sft_dist.estimate.workload import Prepared, Workload, find_prepared, unknown_tokens, workload

USABLE = 0.92  # of a device's memory: contexts, communicators and fragmentation take the rest
LIBRARIES = {"cpu": 540 * 2**20, "cuda": 0}  # resident before a model is built: torch and transformers (measured)
BYTES = {"float32": 4, "bfloat16": 2}
MAX_GPUS = 1024
SHORTEST = 512  # tokens of a sequence that is still proposed


@dataclass(frozen=True, slots=True)
class Option:
    """One strategy."""

    strategy: str
    memory: Memory
    peak: int  # of the device, libraries included
    fits: bool
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer for one recipe on `num_devices` of `device`."""

    recipe: Recipe
    architecture: Architecture
    tuned: Tuned
    device: Device
    num_devices: int
    choices: Choices
    work: Workload
    options: tuple[Option, ...]
    recommended: str | None
    reason: str
    remedies: tuple[tuple[str, int], ...]  # settings that fit, with the peak they lead to; empty when something fits

    def option(self, strategy: str) -> Option:
        return next(option for option in self.options if option.strategy == strategy)


def estimate(recipe: Recipe, device: Device, num_devices: int, efficiency: float | None = None) -> Estimate:
    """Raises ConfigError when the architecture is unknown, nothing would be trained, or devices form no groups."""
    refuse_uneven(recipe, num_devices)
    architecture, prepared = read(recipe.model), find_prepared(recipe)
    found = _compare(recipe, architecture, device, num_devices, prepared, efficiency)
    if any(option.fits for option in found.options):
        return found
    remedies = tuple(_remedies(recipe, architecture, device, num_devices, prepared, efficiency))
    return replace(found, remedies=remedies)


def checkpoint_size(recipe: Recipe) -> int:
    """Bytes of one checkpoint of the run. Raises ConfigError when the architecture is unknown."""
    counts = tuned(read(recipe.model), recipe.tuning)
    layout = Layout("ddp", 1, "cpu", 4, BYTES[recipe.precision.master], 0, 0, 1, False, optimizer=recipe.optim.name)
    return checkpoint_bytes(counts, layout)


def _compare(
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
    num_devices: int,
    prepared: Prepared | None,
    efficiency: float | None,
) -> Estimate:
    counts = tuned(architecture, recipe.tuning)
    choices = _choices(recipe, architecture, counts, device, num_devices, prepared)
    work = workload(recipe, choices, prepared)
    options = []
    for strategy in _candidates(recipe, num_devices):
        layout = _layout(recipe, choices, work, strategy, device, num_devices)
        held = memory(architecture, counts, layout)
        peak = held.peak + LIBRARIES[device.kind]
        seconds = step_seconds(architecture, counts, layout, work, device, efficiency)
        options.append(Option(strategy, held, peak, peak <= USABLE * device.memory, seconds))
    best, reason = _recommend(options, device)
    return Estimate(recipe, architecture, counts, device, num_devices, choices, work, tuple(options), best, reason, ())


def _choices(
    recipe: Recipe,
    architecture: Architecture,
    counts: Tuned,
    device: Device,
    num_devices: int,
    prepared: Prepared | None,
) -> Choices:
    """What `auto` will become: the very function that training calls."""
    facts = Facts(
        num_parameters=counts.base + counts.added,
        num_trained=counts.trained,
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_layers,
        num_train_tokens=unknown_tokens() if prepared is None else prepared.num_tokens,
        num_train_examples=0 if prepared is None else len(prepared.lengths),
        world_size=num_devices,
        device=device.kind,
        memory_bytes=device.memory,
        intermediate_size=architecture.intermediate_size,
    )
    return choose(recipe, facts)


def _candidates(recipe: Recipe, num_devices: int) -> tuple[str, ...]:
    """Strategies that mean something here: one device shards nothing, offloading needs ZeRO."""
    if recipe.parallel.offload == "params":
        return ("zero3",)
    if recipe.parallel.offload == "optimizer":
        return ("zero1", "zero2", "zero3")
    if recipe.parallel.dp_replicate > 1:
        return ("fsdp2",)
    asked = () if recipe.parallel.strategy in ("auto", "ddp") else (recipe.parallel.strategy,)
    return STRATEGIES if num_devices > 1 else ("ddp", *asked)


def _layout(
    recipe: Recipe, choices: Choices, work: Workload, strategy: str, device: Device, num_devices: int
) -> Layout:
    micro_tokens = choices.packs_per_micro_batch * recipe.data.seq_len
    micro_batches = choices.micro_batches_per_step or -(-work.step_tokens // micro_tokens)
    shared_by = recipe.parallel.sequence
    return Layout(
        strategy=strategy,
        world_size=num_devices,
        device=device.kind,
        compute=BYTES[choices.compute],
        master=BYTES[recipe.precision.master],
        micro_tokens=micro_tokens // shared_by,
        micro_loss_tokens=round(micro_tokens / shared_by * work.supervised),
        rounds=-(-micro_batches * shared_by // num_devices),
        checkpointing=choices.activation_checkpointing == "full",
        offload=recipe.parallel.offload,
        optimizer=recipe.optim.name,
        dp_replicate=recipe.parallel.dp_replicate if strategy == "fsdp2" else 1,
        saves_in_background=recipe.checkpoint.background,
    )


def _recommend(options: list[Option], device: Device) -> tuple[str | None, str]:
    """The fastest that fits; among equals the simplest, which comes first."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        least = min(options, key=lambda option: option.peak)
        return None, (
            f"none fits: {least.strategy} needs least, {least.peak / GIB:.1f} GiB of "
            f"{USABLE * device.memory / GIB:.1f} GiB usable"
        )
    best = min(fitting, key=lambda option: round(option.step_seconds, 3))
    rest = [option for option in options if option is not best]
    if not rest:
        return best.strategy, "fits, and there is nothing to shard"
    if best.step_seconds * 1.02 < min(option.step_seconds for option in rest):
        return best.strategy, "the fastest that fits"
    too_large = [option.strategy for option in options[: options.index(best)] if not option.fits]
    if too_large:
        verb = "does" if len(too_large) == 1 else "do"
        return best.strategy, f"{' and '.join(too_large)} {verb} not fit, and the rest are not faster"
    return best.strategy, "fits, nothing is faster, and it is the simplest"


def _remedies(
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
    num_devices: int,
    prepared: Prepared | None,
    efficiency: float | None,
) -> Iterator[tuple[str, int]]:
    """Settings under which something fits, each computed like the estimate itself; the mildest first."""
    found_kinds = set()
    for kind, text, changed, devices in _changes(recipe, architecture, num_devices):
        if kind in found_kinds:
            continue
        data = prepared if changed.data.seq_len == recipe.data.seq_len else None
        found = _compare(changed, architecture, device, devices, data, efficiency)
        if found.recommended is not None:
            found_kinds.add(kind)
            yield f"{text} ({found.recommended})", found.option(found.recommended).peak


def _changes(recipe: Recipe, architecture: Architecture, num_devices: int) -> Iterator[tuple[str, str, Recipe, int]]:
    """(kind, as the user writes it, the recipe changed so, devices); of each kind the mildest first."""
    checkpointed = _set(recipe, "memory", activation_checkpointing="full")
    seq_len = recipe.data.seq_len
    waiting = _set(recipe, "checkpoint", background=False)
    yield "saving", "checkpoint.async=false", waiting, num_devices
    small = _set(checkpointed, "batch", tokens_per_micro_batch=seq_len, tokens_per_step="auto")
    text = f"memory.activation_checkpointing=full batch.tokens_per_micro_batch={seq_len}"
    yield "activations", "memory.activation_checkpointing=full", checkpointed, num_devices
    yield "activations", text, small, num_devices
    shared_by = recipe.parallel.sequence
    while recipe.data.packing != "padded" and math.gcd(num_devices, architecture.num_heads) % (2 * shared_by) == 0:
        shared_by *= 2
        shared = _set(small, "parallel", sequence=shared_by)
        yield "sequence", f"parallel.sequence={shared_by} {text}", shared, num_devices
    while (seq_len := seq_len // 2) >= SHORTEST:
        shorter = _set(_set(small, "data", seq_len=seq_len), "batch", tokens_per_micro_batch=seq_len)
        yield "length", f"data.seq_len={seq_len} memory.activation_checkpointing=full", shorter, num_devices
    if recipe.precision.master == "float32":
        narrow = _set(small, "precision", master="bfloat16", compute="bfloat16")
        yield "precision", f"precision.master=bfloat16 precision.compute=bfloat16 {text}", narrow, num_devices
    if recipe.tuning.method == "full":
        yield "lora", f"tuning.method=lora {text}", _set(small, "tuning", method="lora", freeze=[]), num_devices
    if recipe.parallel.dp_replicate > 1:
        alone = _set(small, "parallel", dp_replicate=1)
        yield "mesh", f"parallel.dp_replicate=1 {text}", alone, num_devices
    for offload in ("optimizer", "params"):
        moved = _set(small, "parallel", offload=offload, strategy="auto", dp_replicate=1)
        yield "offload", f"parallel.offload={offload} {text}", moved, num_devices
    devices = num_devices
    while (devices := 2 * devices) <= MAX_GPUS:
        yield "devices", f"--gpus {devices} {text}", small, devices


def _set(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
