"""Everything a run is made of, built once from the recipe: data, model, engine, plan, optimizer, checkpoints.

Order matters: data before any process group, the model on the CPU before an engine shards it, the certificate before
the first step.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sft_dist.assembly import prove_boundaries, spread
from sft_dist.certify import Check
from sft_dist.checkpoint.export import rehearse_words
from sft_dist.checkpoint.export_certificate import Words
from sft_dist.config.auto import Choices, Facts, choose, compute_dtype
from sft_dist.config.elastic import ELASTIC, check_micro_batches
from sft_dist.config.identity import identity, read_fingerprint, refuse_changes
from sft_dist.config.loader import load_resolved
from sft_dist.config.schema import Recipe
from sft_dist.data.loader import Loader, Plan, VerifiedDocuments
from sft_dist.data.plan import PackPlan
from sft_dist.data.planning import heldout_plan, train_plan
from sft_dist.data.prepare import PreparedData, prepare
from sft_dist.data.store import TokenStore
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.data.stream_store import AnyStore
from sft_dist.errors import CheckpointError, ConfigError, DataError
from sft_dist.models.adapters import frozen_digest, is_adapter
from sft_dist.models.load import DTYPES, load_tokenizer
from sft_dist.models.packed import causal_lm
from sft_dist.models.rotary import refuse_shared_turns
from sft_dist.models.vocabulary import num_added
from sft_dist.network import Network, build_empty_network, build_network
from sft_dist.observe.header import batch_equation, certificate_line, count
from sft_dist.observe.perf import Shape
from sft_dist.parallel.build import SHARD_BY_SHARD
from sft_dist.parallel.engine import Engine, global_numel
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime, read_place
from sft_dist.parallel.sequence import ALONE, SequenceGroup, sequence_group
from sft_dist.resilience.heartbeat import heart

PAD_MULTIPLE_CPU = 8
VERSIONED = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What exists before any process group: the same on every rank."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


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


def read_inputs(recipe: Recipe, notice: Callable[[str], None]) -> Inputs:
    """Tokenizer and prepared data. Concurrent ranks share the preparation through the cache's lock."""
    tokenizer = load_tokenizer(recipe.model)
    is_first_here = read_place()[2] == 0
    data = prepare(recipe, tokenizer, notice=notice, progress=_beat_while_preparing, reads_streams=is_first_here)
    return Inputs(recipe, tokenizer, data)


def _beat_while_preparing(done: int, total: int) -> None:
    heart().stay("prepare")


def words_of(inputs: Inputs) -> Words:
    """What an export says beside its weights."""
    template, tokenizer = inputs.data.template, inputs.tokenizer
    return Words(tokenizer, template.text, template.stop_token_ids(tokenizer))


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
    fingerprint = make_fingerprint(inputs, choices, plan, frozen)
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


def longest_example(inputs: Inputs) -> int:
    """Tokens of the longest example of any split; of a stream, what its longest may have."""
    if inputs.recipe.data.streams:
        return inputs.recipe.data.seq_len
    splits = (inputs.data.train, inputs.data.eval)
    return max(int(np.max(store.lengths)) for store in splits if isinstance(store, TokenStore))


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


def header_rows(parts: Parts, attempt: int) -> list[tuple[str, str]]:
    """What the user sees before the first step."""
    recipe, choices, plan, place = parts.recipe, parts.choices, parts.train.plan, parts.place
    trained = sum(map(global_numel, parts.engine.trained.values()))
    total = sum(map(global_numel, parts.engine.model.parameters()))
    offloaded = "" if recipe.parallel.offload == "none" else f"{recipe.parallel.offload} offloaded, "
    replicas = recipe.parallel.dp_replicate
    mesh = "" if replicas == 1 else f"{replicas} replicas x {place.world_size // replicas} shards, "
    shared_by = recipe.parallel.sequence
    cut_among = "" if shared_by == 1 else f", each row cut among {shared_by} (sequence parallel)"
    store = parts.inputs.data.train
    so_far = " in the first window of a stream" if recipe.data.streams else ""
    return [
        ("run", f"{recipe.run.name} in {recipe.run.dir}, attempt {attempt}, seed {recipe.run.seed}"),
        (
            "model",
            f"{parts.engine.model.config.model_type} {recipe.model.path or ''} ({recipe.model.init}), "  # type: ignore[union-attr]
            f"{count(total)} parameters, {count(trained)} trained ({recipe.tuning.method}), "
            f"compute {choices.compute}, master {recipe.precision.master}",
        ),
        (
            "data",
            f"{len(store):,} examples, {store.num_tokens:,} tokens{so_far}, {store.supervised_share:.1%} supervised, "
            f"{len(parts.inputs.data.eval or ()):,} held out, template {parts.inputs.data.template.name}",
        ),
        (
            "engine",
            f"{parts.engine.name}, {offloaded}{mesh}{place.world_size} process(es) on {place.device.type}, "
            f"{place.num_threads} thread(s) each{cut_among}; {choices.strategy_reason or 'as recorded'}",
        ),
        (
            "batch",
            batch_equation(
                choices.packs_per_micro_batch,
                recipe.data.seq_len,
                choices.micro_batches_per_step,
                place.world_size,
                shared_by,
            ),
        ),
        (
            "plan",
            f"{plan.num_steps} optimizer steps, packing {recipe.data.packing}, {plan.efficiency:.1%} of slots filled",
        ),
        (
            "optimizer",
            f"{recipe.optim.name}, lr {choices.lr:g} {recipe.optim.schedule}, "
            f"activation checkpointing {choices.activation_checkpointing}"
            + (", offloaded" if recipe.memory.activation_offload else "")
            + (", compiled layers" if recipe.precision.compile else ""),
        ),
        *parts.kernels,
        ("certificate", certificate_line([(c.name, c.figure, c.limit) for c in parts.checks])),
    ]


def make_fingerprint(
    inputs: Inputs, choices: Choices, plan: PackPlan | StreamPlan, frozen: str | None
) -> dict[str, Any]:
    """What must not change between attempts (`recipe`, `inputs`), what `auto` became, and versions for the record."""
    return {
        "recipe": identity(inputs.recipe),
        "inputs": data_fingerprint(inputs, plan) | {"frozen weights": frozen},
        "choices": choices.as_dict(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }


def data_fingerprint(inputs: Inputs, plan: PackPlan | StreamPlan) -> dict[str, Any]:
    """Hashes of what the steps are made from."""
    data, template = inputs.data, inputs.data.template
    return {
        "data.train": data.train.fingerprint,
        "data.eval": data.eval.fingerprint if data.eval is not None else None,
        "template": hashlib.sha256(template.text.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(inputs.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "plan": plan.digest,
    }


def reopen(run_dir: Path, notice: Callable[[str], None]) -> tuple[Inputs, Choices, PackPlan | StreamPlan]:
    """What the run in `run_dir` is made from, proven to be what it recorded; no model is loaded.

    Raises CheckpointError when it is no run folder or its record is damaged, DataError when its data changed.
    """
    path = run_dir / "fingerprint.json"
    try:
        recorded = read_fingerprint(run_dir)
        if recorded is None or not (run_dir / "config.yaml").is_file():
            raise CheckpointError(f"{run_dir}: holds no config.yaml and fingerprint.json, so it is no run folder")
        choices, before = Choices(**recorded["choices"]), dict(recorded["inputs"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: altered ({error}); restore it from a copy") from error
    inputs = read_inputs(load_resolved(run_dir / "config.yaml"), notice)
    plan = train_plan(inputs.recipe, choices, inputs.data.train)
    for key, value in data_fingerprint(inputs, plan).items():
        if before.get(key) != value:
            raise DataError(
                f"{key} is {value} today, {run_dir} was trained with {before.get(key)}: restore what it was made from"
            )
    return inputs, choices, plan


def explain_inputs(recipe: Recipe) -> dict[str, str]:
    """What the hashed inputs are made from, for the one line that refuses a change."""
    data, model = recipe.data, recipe.model
    paths = {role: ", ".join(s.path for s in getattr(data, role)) for role in ("sources", "eval_sources")}
    return {
        "data.train": f"the training examples from {paths['sources']}",
        "data.eval": f"the validation examples from {paths['eval_sources'] or paths['sources']}",
        "template": f"data.chat_template={data.chat_template}",
        "tokenizer": f"the files of {model.tokenizer or model.path}",
        "frozen weights": f"the weights of {model.path} that are not trained",
    }


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


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; eos where the tokenizer has no pad token (it carries no label, so nothing learns it)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ConfigError("model.tokenizer has neither pad nor eos token: name one in its tokenizer_config.json")
