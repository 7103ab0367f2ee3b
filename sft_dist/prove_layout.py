"""The layout certificate alone: one rank of `sft-dist certify RECIPE --layout`, started once per process.

    torchrun --nproc-per-node 4 -m sft_dist.prove_layout R.yaml parallel.dp_replicate=2

No data and no weights are read: the certificate works on a copy of reduced depth, of the architecture only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from sft_dist.config.auto import Choices, Facts, choose, refuse_uneven
from sft_dist.config.loader import load_recipe
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.errors import SftError
from sft_dist.layout_certificate import certify_layout
from sft_dist.models.load import load_config
from sft_dist.parallel.messages import broadcast_json
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.parallel.sequence import sequence_group
from sft_dist.parts import memory_bytes
from sft_dist.train import train_step


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one JSON object on rank 0: strategy, why, and the checks. Returns the exit code."""
    with runtime() as place:
        try:
            found = prove(load_recipe(*split_arguments(sys.argv[1:] if argv is None else argv)), place)
        except SftError as error:
            if place.is_main:
                print(json.dumps({"error": str(error)}), flush=True)
            return 0 if place.is_main else error.exit_code  # the launcher reads the line
        if place.is_main:
            print(json.dumps(found), flush=True)
    return 0


def prove(recipe: Recipe, place: Runtime) -> dict[str, object]:
    """The certificate under the engine that training would take."""
    refuse_uneven(recipe, place.world_size)
    config = load_config(recipe.model)
    choices = chosen(recipe, config, place)
    sequence = sequence_group(recipe.parallel.sequence, place)
    checks = certify_layout(recipe, choices, config, place, train_step, sequence=sequence)
    return {
        "model": config.model_type,
        "strategy": choices.strategy,
        "reason": choices.strategy_reason,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
    }


def chosen(recipe: Recipe, config: PretrainedConfig, place: Runtime) -> Choices:
    """What training would choose, from the architecture alone: adapters count as nothing, no data are prepared."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    text, number = config.get_text_config(), sum(p.numel() for p in model.parameters())
    facts = Facts(
        num_parameters=number,
        num_trained=number if recipe.tuning.method == "full" else 0,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_train_tokens=0,
        num_train_examples=0,
        world_size=place.world_size,
        device=place.device.type,
        memory_bytes=broadcast_json(memory_bytes(place)),
        intermediate_size=getattr(text, "intermediate_size", None) or 0,
    )
    return choose(recipe, facts)


if __name__ == "__main__":
    sys.exit(main())
