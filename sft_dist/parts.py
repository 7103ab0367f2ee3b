"""Everything a run is made of, built once from the recipe: data, model, engine, plan, optimizer, checkpoints.

Order matters: data before any process group, the model on the CPU before an engine shards it, the certificate before
the first step.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft_dist.assembly import prove_boundaries, spread
from sft_dist.certify import Check
from sft_dist.checkpoint.export import rehearse_words
from sft_dist.config.auto import Choices, Facts, choose, compute_dtype
from sft_dist.config.elastic import ELASTIC, check_micro_batches
from sft_dist.config.identity import read_fingerprint, refuse_changes
from sft_dist.config.schema import Recipe
from sft_dist.data.loader import Loader, Plan, VerifiedDocuments
from sft_dist.data.plan import PackPlan
from sft_dist.data.planning import heldout_plan, train_plan
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.data.stream_store import AnyStore
from sft_dist.fingerprint import explain_inputs, make_fingerprint
from sft_dist.inputs import Inputs, longest_example, pad_token_id, words_of
from sft_dist.models.adapters import frozen_digest, is_adapter
from sft_dist.models.load import DTYPES
from sft_dist.models.packed import causal_lm
from sft_dist.models.rotary import refuse_shared_turns
from sft_dist.models.vocabulary import num_added
from sft_dist.network import Network, build_empty_network, build_network
from sft_dist.observe.perf import Shape
from sft_dist.parallel.build import SHARD_BY_SHARD
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime
from sft_dist.parallel.sequence import ALONE, SequenceGroup, sequence_group

PAD_MULTIPLE_CPU = 8


@dataclass(frozen=True, slots=True)
class Split:
    """A planned data split with this rank's loader."""

    plan: PackPlan | StreamPlan
    loader: Loader


@dataclass(frozen=True, slots=True)
class Parts:
    """A run, ready to step."""

    recipe: Recipe
    place: Runtime
    inputs: Inputs
    engine: Engine
    choices: Choices
    train: Split
    heldout: dict[str, Split]  # source of the recipe -> its held-out examples; empty where nothing is held out
    fingerprint: dict[str, Any]
    checks: list[Check]
    kernels: list[tuple[str, str]]  # (part, implementation and why)
    shape: Shape
    sequence: SequenceGroup = ALONE

    def close(self) -> None:
        """End the loaders' threads."""
        for split in (self.train, *self.heldout.values()):
            split.loader.close()


def build_parts(inputs: Inputs, place: Runtime, run_dir: Path, chosen: Choices | None = None) -> Parts:
    """Model, engine, plan and optimizer; refuses a run folder whose fingerprint differs. `chosen` takes the place of
    what would be chosen or was recorded.

    Raises ConfigError or CertificateError with the way out.
    """
    recipe = inputs.recipe
    sequence = sequence_group(recipe.parallel.sequence, place)
    recorded = broadcast_json(read_fingerprint(run_dir) if place.is_main else None)
    compute = recorded["choices"]["compute"] if recorded else compute_dtype(recipe, place.device.type)
    network, choices = _network(inputs, recorded, DTYPES[compute], place, sequence)
    choices = chosen or choices
    if not is_adapter(network.model):  # an adapter's folder has no config.json to mislead a reader
        rehearse_words(network.config, words_of(inputs))
    if recipe.run.deterministic == ELASTIC:
        check_micro_batches(place.world_size, choices.micro_batches_per_step)
    refuse_shared_turns(
        network.config,
        longest_example(inputs),
        is_alone=recipe.data.packing == "none" and choices.packs_per_micro_batch == sequence.size == 1,
    )
    plan = train_plan(recipe, choices, inputs.data.train)
    frozen = broadcast_json(frozen_digest(network.model, network.value) if place.is_main else None)
    run = recorded.get("run") if recorded else broadcast_json(secrets.token_hex(16))
    fingerprint = make_fingerprint(inputs, choices, plan, frozen, run)
    if recorded is not None:
        for part in ("recipe", "inputs"):
            refuse_changes(recorded[part], fingerprint[part], str(run_dir), explain_inputs(recipe))
    shape = decoder_shape(network.model)
    engine = spread(network, recipe, choices, place)
    checks = prove_boundaries(network, engine, recipe, place, sequence)
    split = lambda store, plan: Split(plan, _loader(recipe, inputs, choices, place, sequence, store, plan))  # noqa: E731
    heldout = {} if inputs.data.eval is None else inputs.data.eval.by_source()
    return Parts(
        recipe=recipe,
        place=place,
        inputs=inputs,
        engine=engine,
        choices=choices,
        train=split(inputs.data.train, plan),
        heldout={name: split(part, heldout_plan(recipe, choices, part)) for name, part in heldout.items()},
        fingerprint=fingerprint,
        checks=checks,
        kernels=network.kernels,
        shape=shape,
        sequence=sequence,
    )


def _network(
    inputs: Inputs, recorded: dict[str, Any] | None, compute: torch.dtype, place: Runtime, sequence: SequenceGroup
) -> tuple[Network, Choices]:
    """The network and what is chosen for it. Its weights stay in their files where the engine will read its shards."""
    recipe, store, vocab_size = inputs.recipe, inputs.data.train, len(inputs.tokenizer)
    needs, added = (recipe, compute, place.device), num_added(inputs.tokenizer)
    asked = recipe.parallel.strategy
    may_shard = asked in SHARD_BY_SHARD or (asked == "auto" and place.world_size > 1)
    if may_shard and (network := build_empty_network(*needs, vocab_size=vocab_size, sequence=sequence)):
        choices = _choices(recipe, recorded, network.model, store, place)
        if choices.strategy in SHARD_BY_SHARD:
            return network, choices
    network = build_network(*needs, vocab_size=vocab_size, num_added=added, sequence=sequence)
    return network, _choices(recipe, recorded, network.model, store, place)


def decoder_shape(model: nn.Module) -> Shape:
    """The numbers that decide a step's FLOPs, read before the engine shards anything."""
    lm = causal_lm(model)
    text = lm.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    edges = {id(lm.get_input_embeddings().weight), id(lm.get_output_embeddings().weight)}
    return Shape(
        num_matrix_parameters=sum(p.numel() for p in lm.parameters() if p.ndim == 2 and id(p) not in edges),
        num_layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * head_dim,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        trains_all=not is_adapter(model),
    )


def _choices(
    recipe: Recipe, recorded: dict[str, Any] | None, model: nn.Module, store: AnyStore, place: Runtime
) -> Choices:
    """New runs choose; resumed runs keep what was chosen, whatever the world size is now.

    Rank 0's memory decides for all, so that ranks on unlike machines still agree.
    """
    if recorded is not None:
        values = dict(recorded["choices"])
        if recipe.parallel.strategy != "auto":
            values |= {"strategy": recipe.parallel.strategy, "strategy_reason": "as the recipe says"}
        return Choices(**values)
    config = causal_lm(model).config.get_text_config()
    facts = Facts(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_train_tokens=store.num_tokens,
        num_train_examples=len(store),
        world_size=place.world_size,
        device=place.device.type,
        memory_bytes=broadcast_json(memory_bytes(place)),
        intermediate_size=getattr(config, "intermediate_size", None) or 0,
    )
    return choose(recipe, facts)


def memory_bytes(place: Runtime) -> int:
    """Memory one process may use: the GPU's, or its share of the machine's."""
    if place.device.type == "cuda":
        return torch.cuda.get_device_properties(place.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // place.local_world_size


def _loader(
    recipe: Recipe,
    inputs: Inputs,
    choices: Choices,
    place: Runtime,
    sequence: SequenceGroup,
    store: VerifiedDocuments,
    plan: Plan,
) -> Loader:
    """Rows have one fixed size on GPUs (kernels and allocator like that); on CPUs padding would only cost time."""
    fixed = place.device.type == "cuda" and recipe.data.packing != "padded"
    return Loader(
        store,
        plan,
        rank=place.rank // sequence.size,
        world_size=place.world_size // sequence.size,
        packing=recipe.data.packing,
        pad_token_id=pad_token_id(inputs.tokenizer),
        pad_to_multiple_of=sequence.pad_multiple(
            choices.packs_per_micro_batch * recipe.data.seq_len if fixed else PAD_MULTIPLE_CPU
        ),
        device=place.device,
        cut=sequence.cut,
        reads_all=place.is_main,  # it writes metrics.jsonl
    )
