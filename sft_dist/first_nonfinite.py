"""Where a step's first NaN or infinity is: a layer of the forward pass, or a parameter whose gradient alone is none.

{"layer": "model.layers.3.mlp.down_proj", "micro_batch": 5, "rank": 1}     some loss is no number
{"parameter": "model.layers.3.mlp.down_proj.weight"}                       only gradients are none
None                                                                       all are numbers, their norm overflows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.data.loader import LoadedStep
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import gather_json

HEAD = "loss head"  # a function, no layer
Sighting = tuple[int, str]  # layers that were done before it, name


def first_layer(
    engine: Engine, loaded: LoadedStep, again: Callable[[], Tensor], micro_batch: int
) -> dict[str, str | int]:
    """The first layer, in forward order, whose output is not finite where `again` passes over `micro_batch`, and the
    rank that saw it. Collective; leaves no gradients behind."""
    with watching(engine) as passes:
        again()
    engine.discard_gradients()
    seen = dict(zip(loaded.indices, passes, strict=True)).get(micro_batch)
    sightings = [(*sighting, rank) for rank, sighting in enumerate(gather_json(seen)) if sighting is not None]
    _, layer, rank = min(sightings)  # several ranks have a micro-batch where they cut its row among them
    return {"layer": layer, "micro_batch": micro_batch, "rank": rank}


def first_parameter(norms: dict[str, float]) -> dict[str, str | int] | None:
    """The first one in backward order among gradient `norms` in the model's order that is not finite."""
    name = next((name for name in reversed(norms) if not math.isfinite(norms[name])), None)
    return None if name is None else {"parameter": name}


@contextmanager
def watching(engine: Engine) -> Iterator[list[Sighting]]:
    """One entry for each forward pass inside. Compiled layers run uncompiled: hooks would have them compiled anew."""
    passes: list[Sighting] = []
    num_done = 0

    def begin(*_: Any) -> None:
        nonlocal num_done
        num_done = 0
        passes.append((len(layers), HEAD))

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        nonlocal num_done
        num_done += 1
        if passes[-1][1] == HEAD and not _is_finite(output):
            passes[-1] = num_done, name

    layers = {name: module for name, module in engine.model.named_modules() if name}
    hooks = [engine.packed.register_forward_pre_hook(begin)]
    hooks += [module.register_forward_hook(partial(look, name)) for name, module in layers.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(output: Any) -> bool:
    """Whether every number in a layer's output is finite, however it is nested."""
    if isinstance(output, Tensor):
        return bool(output.detach().isfinite().all())  # a recomputed layer must save as many tensors again
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return all(map(_is_finite, inner))
