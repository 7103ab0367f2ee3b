"""From a network to the engine that trains it, and the proof that its documents stay apart there.

Wrapping has one order: layers are compiled, then told what to keep, then sharded or replicated.
"""

from __future__ import annotations

from functools import partial

import torch

from sft_dist.certify import Check, certify
from sft_dist.config.auto import Choices
from sft_dist.config.elastic import ELASTIC
from sft_dist.config.schema import Recipe
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.models.recompute import compile_layers, keep_activations
from sft_dist.network import Network
from sft_dist.optim import build_optimizer
from sft_dist.parallel.build import CASTS_ITSELF, build_engine
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime
from sft_dist.parallel.sequence import SequenceGroup


def spread(network: Network, recipe: Recipe, choices: Choices, place: Runtime) -> Engine:
    """The engine that was chosen, around the network, with the recipe's optimizer."""
    layers = decoder_layers(causal_lm(network.model))
    on_gpu = place.device.type == "cuda"
    if recipe.precision.compile:
        compile_layers(layers, network.config._attn_implementation if network.backend else None, on_gpu=on_gpu)
    keep_activations(
        layers,
        choices.activation_checkpointing,
        offload=recipe.memory.activation_offload,
        on_gpu=on_gpu,
    )
    autocast = network.compute if choices.strategy not in CASTS_ITSELF and network.compute != torch.float32 else None
    return build_engine(
        choices.strategy,
        PackedCausalLM(network.model, network.head, autocast_dtype=autocast, neftune_alpha=recipe.optim.neftune_alpha),
        layers,
        place,
        network.compute,
        partial(
            build_optimizer,
            optim=recipe.optim,
            lr=choices.lr,
            exact=recipe.run.deterministic == ELASTIC,
            rounding_seed=recipe.run.seed if recipe.precision.stochastic_rounding else None,
        ),
        offload=recipe.parallel.offload,
        dp_replicate=recipe.parallel.dp_replicate,
        weights=network.files,
        exact=recipe.run.deterministic == ELASTIC,
    )


def prove_boundaries(
    network: Network, engine: Engine, recipe: Recipe, place: Runtime, sequence: SequenceGroup
) -> list[Check]:
    """The certificate of this model under this engine. Raises CertificateError with the way out."""
    with engine.evaluating():
        return certify(
            engine.packed.hidden_states,  # type: ignore[arg-type]  # a method of PackedCausalLM
            network.config,
            head=network.head,
            backend=network.backend,
            packing=recipe.data.packing,
            device=place.device,
            dtype=network.compute,
            seed=recipe.run.seed,
            sequence=sequence,
        )
