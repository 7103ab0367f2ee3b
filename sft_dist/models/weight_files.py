"""Weights read straight from safetensors into parameters that are already sharded: no host ever holds the model.

    skeleton = empty_model(...)     parameters without memory; buffers are real (rotary frequencies are in no file)
    files = find_files(...)         `files.gap(skeleton)` is None where they hold every parameter under its name
    <shard the skeleton>
    files.fill(skeleton, device)    memory for this rank's shards; it reads its rows of every parameter, file by file
    files.value(name, parameter)    or one whole value after another: an engine cuts it, a 4-bit base quantises it

A rank's memory is its own share plus the pages of one file, or one tensor. The bits are those of the ordinary load: the
same values cast the same way, and what no file holds (LoRA's matrices) comes from (seed, name) as always. DoRA's
magnitudes are the lengths of the rows of the matrix that they stand beside, which is read whole for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from sft_dist.config.schema import ModelSection
from sft_dist.models.adapters import initial_adapter
from sft_dist.models.load import load_config

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What PEFT puts around and into names.
MAGNITUDE = "lora_magnitude_vector.default."
WRAPPED = ("base_model.model.", "base_layer.", "modules_to_save.default.", "original_module.", MAGNITUDE)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where each tensor of a pretrained model is."""

    files: dict[str, Path]  # name -> file
    seed: int  # of what stands in no file
    dtype: torch.dtype  # of the base model: everything passes through it, as it does when a model is loaded whole

    def gap(self, model: nn.Module) -> str | None:
        """A parameter or saved buffer that no file holds under its own name (files of an older layout, which
        transformers renames as it loads), or as its rows (magnitudes of GPT-2, whose matrices lie on their side); None
        when there is none."""
        wanted = dict(model.named_parameters()) | _saved_buffers(model)
        aside = {name for name, module in model.named_modules() if getattr(module, "fan_in_fan_out", False)}
        return next(
            (
                name
                for name in wanted
                if (self._file_name(name) is None and not _is_adapter(name))
                or (MAGNITUDE in name and name.partition("." + MAGNITUDE)[0] in aside)
            ),
            None,
        )

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Memory on `device` and values for what this rank holds of `model`, a sharded one without memory."""
        give_memory(model, device)
        self._read_into(dict(model.named_parameters()) | _saved_buffers(model))

    def load(self, model: nn.Module, hold: Callable[[str, nn.Parameter, Tensor], nn.Parameter]) -> None:
        """Whole values for every parameter of `model` that has no memory, one after another, and for saved buffers.
        `hold(name, empty parameter, value)` gives what takes the parameter's place, wherever it is tied to."""
        names, places = {p: name for name, p in model.named_parameters()}, _places(model)
        for parameter in [p for p in places if p.is_meta]:
            name = names[parameter]
            held = hold(name, parameter, self.value(name, parameter))
            for module, attribute in places[parameter]:
                setattr(module, attribute, held)
        self._read_into(_saved_buffers(model))

    def _read_into(self, tensors: dict[str, Tensor]) -> None:
        """One file is open at a time: the pages of the others do not count against this process."""
        place = {name: str(self.files.get(self._file_name(name) or "", "")) for name in tensors}
        for path, names in groupby(sorted(tensors, key=lambda name: place[name]), key=lambda name: place[name]):
            with safe_open(path, framework="pt") if path else nullcontext() as file:
                for name in names:
                    self._fill_one(file, name, tensors[name])

    def value(self, name: str, parameter: Tensor) -> Tensor:
        """The whole value of one parameter, in its dtype, on the CPU."""
        key = self._file_name(name)
        with safe_open(self.files[key], framework="pt") if key else nullcontext() as file:
            return self._read(file, name, tuple(parameter.shape), slice(None)).to(parameter.dtype)

    @torch.no_grad()
    def _fill_one(self, file: Any, name: str, tensor: Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.copy_(self._read(file, name, tuple(tensor.shape), rows_of(tensor)))

    def _read(self, file: Any, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        key = self._file_name(name)
        if key is None:
            return initial_adapter(name, shape, self.seed)[rows].to(self.dtype)
        if MAGNITUDE in name:  # B is zero, so nothing is added to the matrix yet
            return torch.linalg.norm(file.get_tensor(key).to(self.dtype), dim=1)[rows]
        held = file.get_slice(key)[rows] if shape else file.get_tensor(key)
        return held.to(self.dtype) if held.is_floating_point() else held

    def _file_name(self, name: str) -> str | None:
        for part in WRAPPED:
            name = name.replace(part, "")
        return name if name in self.files else None


def find_files(model: ModelSection, seed: int, dtype: torch.dtype) -> WeightFiles | None:
    """The safetensors of `model.path`, a folder or a hub id (downloaded then); None where there are none."""
    index = _locate(model, INDEX)
    if index is not None:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        found = {name: _locate(model, name) for name in set(placed.values())}
        if None in found.values():
            return None
        return WeightFiles({key: found[name] for key, name in placed.items()}, seed, dtype)  # type: ignore[misc]
    whole = _locate(model, WHOLE)
    if whole is None:
        return None
    with safe_open(whole, framework="pt") as file:
        return WeightFiles(dict.fromkeys(file.keys(), whole), seed, dtype)


def empty_model(model: ModelSection, *, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture of `model.path`, its parameters on the meta device, its buffers real, in training mode."""
    config = load_config(model)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
    network.tie_weights()  # the context above makes parameters anew wherever one is set, and so unties them
    if _locate(model, "generation_config.json") is not None:
        network.generation_config = GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    network.config.use_cache = False  # a cache object makes transformers drop document boundaries silently
    return network.train()


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory for every parameter, still without values; buffers are kept, which `to_empty` would turn to garbage."""
    buffers = [
        (owner, name, b.to(device)) for owner in module.modules() for name, b in owner.named_buffers(recurse=False)
    ]
    module.to_empty(device=device)
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer


def rows_of(tensor: Tensor) -> slice:
    """The rows that this rank holds of a tensor sharded on its first dimension; all of a plain one."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    mesh = tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.shape[-1])
    start = min(size * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])
    return slice(start, start + tensor.to_local().shape[0])


def hold_whole(name: str, parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """For `WeightFiles.load`: the value as it is."""
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every parameter with the (module, attribute) that hold it: several where weights are tied."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(parameter, []).append((module, name))
    return found


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _locate(model: ModelSection, name: str) -> Path | None:
    found = cached_file(
        model.path,
        name,
        revision=model.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
