"""One rank: ten steps of the real loop's step with each tuning method and optimizer under each engine.

`python tuning_worker.py FOLDER CASE...`, a case being STRATEGY-METHOD-ACCUMULATION-OPTIMIZER-COMPUTE. What a case
trains on is the same at every world size.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import zero_worker
from architectures import SMALL
from safetensors.torch import save_file
from tiny_run import write_tokenizer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from zero_worker import load_step, logits

from sft_dist.checkpoint.export import export_model, package_of
from sft_dist.checkpoint.export_certificate import Base, Words
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.weights import live_weights
from sft_dist.config.schema import OptimSection, TuningSection
from sft_dist.milestones import trained_probe
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning, is_adapter
from sft_dist.models.load import DTYPES, build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.models.quantise import quantise
from sft_dist.optim import build_optimizer, set_step
from sft_dist.parallel.build import CASTS_ITSELF, build_engine
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.resilience.ending import run_and_end
from sft_dist.train import StepResult, train_step
from sft_kernels import choose_head

STEPS, SAVED_AFTER = 10, 4
LIMIT = {"float32": 1e-6, "bfloat16": 1e-2}  # relative; bf16 rounds at 4e-3 in another order of sums
NORM_LIMIT = {"muon": 1e-3}
LOSS_LIMIT = {"muon": 1e-5}
WIDE = SMALL | {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}  # whole 4-bit blocks, and biases
OPTIMIZERS = {
    "adamw": OptimSection(weight_decay=0.1),
    "plus": OptimSection(weight_decay=0.1, lora_plus_ratio=4.0),
    "noisy": OptimSection(neftune_alpha=5.0),
    "rounded": OptimSection(weight_decay=0.1),
    "adamw8bit": OptimSection(name="adamw8bit", weight_decay=0.1),
    "adafactor": OptimSection(name="adafactor", weight_decay=0.1),
    "muon": OptimSection(name="muon", weight_decay=0.1),
}


def base_model(dtype: torch.dtype) -> PreTrainedModel:
    """The untrained model of all cases."""
    model = build_random(AutoConfig.for_model("llama", **WIDE), dtype=dtype, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # random weights start with zeros there
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    model.config.use_cache = False
    return model


def build(case: str, place: Runtime) -> Engine:
    strategy, method, _, optimizer, compute = case.split("-")
    dtype, rounded = DTYPES[compute], optimizer == "rounded"
    master = torch.bfloat16 if rounded else torch.float32
    model = base_model(master if method == "full" else dtype)
    attention.install(model, "sdpa")
    tuning = TuningSection.model_validate({"method": method, "rank": 3, "virtual_tokens": 3})
    tuned = apply_tuning(model, tuning, seed=0, compute=dtype)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    optim = OPTIMIZERS[optimizer]
    head = choose_head("reference", "cpu")[1]
    autocast = dtype if strategy not in (*CASTS_ITSELF, "hsdp") and dtype != torch.float32 else None
    packed = PackedCausalLM(tuned, head, autocast_dtype=autocast, neftune_alpha=optim.neftune_alpha)
    make_optimizer = partial(build_optimizer, optim=optim, lr=1e-3, rounding_seed=7 if rounded else None)
    layers = decoder_layers(causal_lm(tuned))
    replicas, strategy = (2, "fsdp2") if strategy == "hsdp" else (1, strategy)
    return build_engine(strategy, packed.train(), layers, place, dtype, make_optimizer, dp_replicate=replicas)


def train(made: Engine, steps: range, accumulation: int, place: Runtime) -> list[StepResult]:
    return [
        train_step(
            made,
            load_step(step, accumulation, place),
            lr=1e-3 * (1 - step / 40),
            max_norm=zero_worker.MAX_NORM,
            seed=5,
            device=place.device,
            stop=False,
        )
        for step in steps
    ]


def resumed(case: str, path: Path, manager: CheckpointManager, accumulation: int, place: Runtime) -> list[StepResult]:
    """The rest of the run from the checkpoint at `path`."""
    again = build(case, place)
    tensors = again.state()
    manager.load(path, tensors)
    again.adopt(tensors)
    set_step(again.optimizer, SAVED_AFTER)
    return train(again, range(SAVED_AFTER + 1, STEPS + 1), accumulation, place)


def run(case: str, folder: Path, place: Runtime) -> dict[str, list[float]]:
    """Ten steps with a checkpoint on the way; accumulation 1 and HSDP resume from it too, the others are exported."""
    _, method, rounds, *_ = case.split("-")
    accumulation = int(rounds)
    made = build(case, place)
    manager = CheckpointManager(folder / f"{case}-{place.world_size}")
    before = train(made, range(1, SAVED_AFTER + 1), accumulation, place)
    path = manager.save(SAVED_AFTER, made.state(), {"step": SAVED_AFTER})
    after = train(made, range(SAVED_AFTER + 1, STEPS + 1), accumulation, place)
    found = {"straight": before + after, "after": after}
    if accumulation == 1 or case.startswith("hsdp"):
        found["resumed"] = resumed(case, path, manager, accumulation, place)
        found["replicas"] = resumed("ddp-" + case.split("-", 1)[1], path, manager, accumulation, place)
    elif place.world_size > 1:
        export(made, folder / "exports" / case, method, place)
    return {
        f"{name}_{figure}": [getattr(result, figure) for result in results]
        for name, results in found.items()
        for figure in ("loss", "grad_norm")
    }


def export(made: Engine, out: Path, method: str, place: Runtime) -> None:
    """The Hugging Face or adapter folder, certified, and the logits that it has to give when it is loaded again."""
    expected = logits(made)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(out.parent / f"tokenizer-{place.rank}"))
    base = Base(0, partial(adapted_base, method)) if is_adapter(made.model) else None
    probe = trained_probe(made, place.device, 1e-5)
    weights = live_weights(made, torch.float32)
    certificate = export_model(package_of(made.model, Words(tokenizer, ""), base), weights, out, probe)
    if place.is_main:
        assert certificate is not None
        save_file({"logits": expected}, out / "expected.safetensors")


def adapted_base(method: str) -> PreTrainedModel:
    """What an adapter stands on when it is loaded again."""
    base = base_model(torch.float32)
    return quantise(base, torch.float32) if method == "qlora" else base


def main(folder: Path, cases: list[str]) -> None:
    with runtime() as place:
        torch.set_num_threads(1)
        found = {}
        for case in cases:
            started = time.perf_counter()
            found[case] = run(case, folder, place)
            if place.is_main:
                print(f"{case}: {time.perf_counter() - started:.1f} s", flush=True)
        if place.is_main:
            (folder / f"found-{place.world_size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
