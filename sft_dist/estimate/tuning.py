"""How many weights stand still and how many are moved, for each tuning method: counts only.

The same rules as `models.adapters` and PEFT: `all-linear` is every matrix but embedding and head, a list names modules
by the end of their names, a word is a regular expression over whole names.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from sft_dist.config.schema import TuningSection
from sft_dist.errors import ConfigError
from sft_dist.estimate.architecture import Architecture, Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Elements of what is gathered together: one decoder layer, or everything outside the layers (the root)."""

    base: int  # of the model itself
    added: int  # by tuning
    trained: int  # what is moved of both


@dataclass(frozen=True, slots=True)
class Tuned:
    """The model as it is trained. `added`: adapters and the copies of `modules_to_save`, all trained."""

    base: int
    added: int
    trained: int
    layer: Group  # the largest one
    root: Group
    trains_head: bool
    trains_all: bool  # no frozen base below
    quantised: bool = False  # matrices of the layers in 4 bits


def tuned(architecture: Architecture, tuning: TuningSection) -> Tuned:
    """Raises ConfigError when nothing would be trained."""
    adapted = _adapted(architecture, tuning) if tuning.is_low_rank else []
    copies = [t for t in architecture.tensors if any(_ends(_module(t), name) for name in tuning.modules_to_save)]
    added: dict[int | None, int] = {}
    for tensor in adapted:
        magnitude = tensor.shape[0] if tuning.method == "dora" else 0
        added[tensor.layer] = added.get(tensor.layer, 0) + tuning.rank * sum(tensor.shape) + magnitude
    if virtual := _virtual(architecture, tuning):
        added[None] = virtual
    for tensor in copies:
        added[tensor.layer] = added.get(tensor.layer, 0) + tensor.numel
    moved = [t for t in architecture.tensors if _is_moved(t, tuning)]
    if not moved and not added:
        if tuning.method == "bitfit":
            raise ConfigError(f"tuning.method=bitfit: {architecture.model_type} has no biases: use tuning.method=lora")
        raise ConfigError(f"tuning.targets={tuning.targets}: matches no matrix of {architecture.model_type}")
    layers = [_group(architecture, moved, added, number) for number in range(architecture.num_layers)]
    head = "model.embed_tokens" if architecture.tied else "lm_head"
    total_added = sum(added.values())
    return Tuned(
        base=architecture.num_parameters,
        added=total_added,
        trained=sum(t.numel for t in moved) + total_added,
        layer=max(layers, key=lambda group: group.base + group.trained),
        root=_group(architecture, moved, added, None),
        trains_head=any(_module(t) == head for t in [*moved, *copies]),
        trains_all=tuning.method == "full",
        quantised=tuning.method == "qlora",
    )


def _group(architecture: Architecture, moved: list[Tensor], added: dict[int | None, int], layer: int | None) -> Group:
    base = sum(t.numel for t in architecture.tensors if t.layer == layer)
    plus = added.get(layer, 0)
    return Group(base, plus, sum(t.numel for t in moved if t.layer == layer) + plus)


def _adapted(architecture: Architecture, tuning: TuningSection) -> list[Tensor]:
    matrices = [t for t in architecture.tensors if len(t.shape) == 2 and t.layer is not None]
    if tuning.targets == "all-linear":
        return matrices
    if isinstance(tuning.targets, str):
        pattern = tuning.targets
        return [t for t in matrices if re.fullmatch(pattern, _module(t))]
    return [t for t in matrices if any(_ends(_module(t), name) for name in tuning.targets)]


def _virtual(architecture: Architecture, tuning: TuningSection) -> int:
    """What prompt tuning learns (embeddings) and prefix tuning (keys and values of every layer)."""
    a = architecture
    width = {"prompt": a.hidden_size, "prefix": a.num_layers * 2 * a.num_kv_heads * a.head_dim}.get(tuning.method, 0)
    return tuning.virtual_tokens * width


def _is_moved(tensor: Tensor, tuning: TuningSection) -> bool:
    if tuning.method == "bitfit":
        return tensor.name.endswith(".bias")
    return tuning.method == "full" and not any(fnmatch.fnmatch(tensor.name, pattern) for pattern in tuning.freeze)


def _module(tensor: Tensor) -> str:
    return tensor.name.rpartition(".")[0]


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
