"""The parameters of a decoder by name and shape, from its config.json alone.

`model.path` may be a folder, or a hub id whose config lies in the hub's cache; `model.config` is taken as it is. The
families below are those whose parameters are derived exactly: the tests compare every name and shape with transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sft_dist.config.schema import ModelSection
from sft_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What a gated decoder has beside the usual seven matrices and two norms of a layer."""

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk_norm: str = ""  # "head": one vector per head size, "width": one over all heads
    qkv_bias: bool = False  # whatever the config says
    fused: bool = False  # qkv and gate-up as one matrix each
    tied: bool = False  # transformers' default where the config is silent
    head_dim: int | None = None  # likewise; None: hidden_size over heads


_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "granite": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head", head_dim=128),
    "gemma": Family(tied=True, head_dim=256),
    "gemma3_text": Family(norms=_FOUR, qk_norm="head", tied=True, head_dim=256),
    "olmo2": Family(norms=_AFTER, qk_norm="width"),
    "olmo3": Family(norms=_AFTER, qk_norm="width"),
    "cohere": Family(norms=("input_layernorm",), tied=True),
    "phi3": Family(fused=True),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter; matrices are [out, in]."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to; None: embedding, last norm, head."""
        parts = self.name.split(".")
        return int(parts[2]) if parts[1] == "layers" else None


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a decoder that decide memory and time. A tied head is listed once, as the embedding."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qk_norm: bool
    num_inward: int  # matrices of a layer that read the residual stream
    num_norms: int  # per layer, without those of queries and keys
    tensors: tuple[Tensor, ...]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def num_matrix_parameters(self) -> int:
        """Of the body: what every token is multiplied with, embedding and head aside."""
        return sum(tensor.numel for tensor in self.tensors if tensor.layer is not None and len(tensor.shape) == 2)


def read(model: ModelSection) -> Architecture:
    """The architecture that the recipe names. Raises ConfigError with the remedy."""
    if model.config is not None:
        return derive(model.config, "model.config")
    path = config_path(str(model.path), model.revision)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    return derive(values, str(path))


def config_path(path: str, revision: str | None) -> Path:
    """config.json of a folder, or of a hub id in the hub's cache on this machine."""
    if Path(path).is_dir():
        return Path(path) / "config.json"
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{path.replace('/', '--')}"
    named = cache / "refs" / (revision or "main")
    commit = named.read_text().strip() if named.is_file() else revision or ""
    found = cache / "snapshots" / commit / "config.json"
    if not commit or not found.is_file():
        raise ConfigError(
            f"model.path={path}: no folder, and its config.json is not in the hub's cache: "
            f"run `hf download {path} config.json` where there is a network, or name a folder"
        )
    return found


def derive(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a config describes; `where` it was read, for messages."""
    model_type = values.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ConfigError(
            f"{where}: model_type {model_type} cannot be estimated; known are {', '.join(sorted(FAMILIES))}"
        )
    needed = {
        name: _number(values, name, where)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    hidden, heads = needed["hidden_size"], needed["num_attention_heads"]
    head_dim = int(values.get("head_dim") or family.head_dim or hidden // heads)
    kv_heads = int(values.get("num_key_value_heads") or heads)
    tied = bool(values.get("tie_word_embeddings", family.tied))
    shape = _Shape(family, values, hidden, needed["intermediate_size"], heads * head_dim, kv_heads * head_dim, head_dim)
    tensors = [Tensor("model.embed_tokens.weight", (needed["vocab_size"], hidden))]
    for layer in range(needed["num_hidden_layers"]):
        tensors += [Tensor(f"model.layers.{layer}.{name}", size) for name, size in shape.layer()]
    tensors.append(Tensor("model.norm.weight", (hidden,)))
    if not tied:
        tensors.append(Tensor("lm_head.weight", (needed["vocab_size"], hidden)))
    return Architecture(
        model_type=str(model_type),
        hidden_size=hidden,
        intermediate_size=needed["intermediate_size"],
        num_layers=needed["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=needed["vocab_size"],
        tied=tied,
        qk_norm=bool(family.qk_norm),
        num_inward=2 if family.fused else 5,
        num_norms=len(family.norms),
        tensors=tuple(tensors),
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """The parameters of one layer. `queries` and `keys` are widths over all heads."""

    family: Family
    values: Mapping[str, Any]
    hidden: int
    inner: int
    queries: int
    keys: int
    head_dim: int

    def layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        qkv_bias = self.family.qkv_bias or bool(self.values.get("attention_bias"))
        out_bias, mlp_bias = bool(self.values.get("attention_bias")), bool(self.values.get("mlp_bias"))
        attention = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.keys}
        widths = {"gate_proj": self.inner, "up_proj": self.inner}
        if self.family.fused:
            attention, widths = {"qkv_proj": self.queries + 2 * self.keys}, {"gate_up_proj": 2 * self.inner}
        for name, width in attention.items():
            yield from _linear(f"self_attn.{name}", width, self.hidden, qkv_bias)
        yield from _linear("self_attn.o_proj", self.hidden, self.queries, out_bias)
        if self.family.qk_norm:
            whole = self.family.qk_norm == "width"
            yield "self_attn.q_norm.weight", (self.queries if whole else self.head_dim,)
            yield "self_attn.k_norm.weight", (self.keys if whole else self.head_dim,)
        for name, width in widths.items():
            yield from _linear(f"mlp.{name}", width, self.hidden, mlp_bias)
        yield from _linear("mlp.down_proj", self.hidden, self.inner, mlp_bias)
        for name in self.family.norms:
            yield f"{name}.weight", (self.hidden,)


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _number(values: Mapping[str, Any], name: str, where: str) -> int:
    found = values.get(name)
    if not isinstance(found, int) or found < 1:
        raise ConfigError(f"{where}: {name} = {found}: must be a positive integer for an estimate")
    return found
