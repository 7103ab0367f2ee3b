"""One rank: eight documents as one global batch, cut in every way; loss and gradients of each cut go to a file."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from architectures import tiny_config
from safetensors.torch import save_file

from sft_dist.certify import Documents
from sft_dist.config.schema import OptimSection, TuningSection
from sft_dist.data.collate import collate
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.optim import build_optimizer
from sft_dist.parallel.build import build_engine
from sft_dist.parallel.engine import Engine, full_tensor
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.resilience.ending import run_and_end
from sft_dist.types import TokenizedExample
from sft_kernels import choose_head

LENGTHS = (3, 29, 1, 14, 8, 40, 2, 17)


def documents() -> Documents:
    rng = np.random.default_rng(7)
    examples = []
    for length in LENGTHS:
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1.0
        examples.append(TokenizedExample(rng.integers(0, 128, length, dtype=np.int32), weights))
    return Documents(tuple(examples))


def engine(strategy: str, method: str, place: Runtime) -> Engine:
    model = build_random(tiny_config("llama"), dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa")
    tuned = apply_tuning(model, TuningSection(method=method, rank=4), seed=0)
    packed = PackedCausalLM(tuned, choose_head("reference", "cpu")[1])
    optimizer = partial(build_optimizer, optim=OptimSection(), lr=1e-3)
    layers, replicas = decoder_layers(causal_lm(tuned)), 2 if strategy == "hsdp" else 1
    strategy = strategy.replace("hsdp", "fsdp2")
    return build_engine(strategy, packed, layers, place, torch.float32, optimizer, dp_replicate=replicas)


def gradients(made: Engine, place: Runtime, micro_batch_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The global batch in micro-batches of `micro_batch_size` documents, rank r taking r, W + r, ..."""
    probe = documents()
    packs = probe.packs
    divisor = sum(pack.loss_weight_sum for pack in packs)
    cuts = [packs[i : i + micro_batch_size] for i in range(0, len(packs), micro_batch_size)]
    mine = cuts[place.rank :: place.world_size]
    total = torch.zeros((), dtype=torch.float64)
    for index, cut in enumerate(mine):
        batch = collate(cut, probe, packing="none", pad_token_id=0, pad_to_multiple_of=8)
        with made.accumulate(index == len(mine) - 1):
            loss = made.forward(batch)
            (loss / divisor).backward()
        total += loss.detach()
    dist.all_reduce(total)
    norm = made.clip_grad_norm(1e9)
    found = {name: full_tensor(p.grad).clone() for name, p in made.trained.items()} | {"norm": norm[None]}
    for parameter in made.trained.values():
        parameter.grad = None
    return total.item() / divisor, found


def main(out: Path) -> None:
    losses = {}
    with runtime() as place:
        for strategy in ("hsdp",) if place.world_size == 4 else ("ddp", "fsdp2"):
            for method in ("full", "lora"):
                made = engine(strategy, method, place)
                for size in (1, 2) if place.world_size == 4 else (1, 2, 4):
                    name = f"{strategy}-{method}-{place.world_size}-{size}"
                    losses[name], found = gradients(made, place, size)
                    if place.is_main:
                        save_file(found, out / f"{name}.safetensors")
                del made
        if place.is_main:
            (out / f"losses-{place.world_size}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1])))
