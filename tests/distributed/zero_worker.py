"""One rank: twenty steps of the real loop's step under each engine; losses, norms and exports go to files.

`python zero_worker.py FOLDER CASE...`, a case being STRATEGY-OFFLOAD-METHOD-ACCUMULATION-COMPUTE; hsdp is fsdp2 as two
replicas. The global batch of a
case is the same at every world size: accumulation 1 at two processes is two micro-batches at one.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from architectures import tiny_config
from safetensors.torch import save_file
from tiny_run import write_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_dist.certify import Documents
from sft_dist.checkpoint.export import export_model, package_of, probe_limit
from sft_dist.checkpoint.export_certificate import Base, Words
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.weights import live_weights
from sft_dist.config.schema import OptimSection, TuningSection
from sft_dist.data.collate import collate
from sft_dist.data.loader import LoadedStep
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
from sft_dist.types import StepPlan, TokenizedExample
from sft_kernels import choose_head

WORLD = 2  # what accumulation counts are told for
STEPS, SAVED_AFTER = 20, 8
MAX_NORM = 1.3
OPTIM = OptimSection(weight_decay=0.1)


def documents(seed: int, number: int) -> Documents:
    rng = np.random.default_rng(seed)
    examples = []
    for length in rng.integers(3, 30, number):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1.0
        examples.append(TokenizedExample(rng.integers(0, 128, length, dtype=np.int32), weights))
    return Documents(tuple(examples))


def load_step(step: int, accumulation: int, place: Runtime) -> LoadedStep:
    """Micro-batches of two documents, rank r of W taking r, W + r, ..., as the loader deals them."""
    number = WORLD * accumulation
    probe = documents(1000 + step % 5, 2 * number)
    cuts = tuple(probe.packs[i : i + 2] for i in range(0, 2 * number, 2))
    mine = range(place.rank, number, place.world_size)
    batches = tuple(collate(cuts[i], probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8) for i in mine)
    return LoadedStep(StepPlan(step, 0, cuts), batches, tuple(mine), "")


def untuned(method: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a case before anything is added; that of qlora is wide enough for whole blocks of 4-bit codes."""
    config = tiny_config("llama")
    if method == "qlora":
        config.update({"hidden_size": 64, "intermediate_size": 128})
    return build_random(config, dtype=dtype, seed=0)


def untuned_base(method: str, dtype: torch.dtype) -> PreTrainedModel:
    """What an adapter stands on when it is loaded again."""
    model = untuned(method, dtype)
    return quantise(model, dtype) if method == "qlora" else model


def build(case: str, place: Runtime) -> Engine:
    strategy, offload, method, _, compute = case.split("-")
    dtype = DTYPES[compute]
    model = untuned(method, torch.float32 if method == "full" else dtype)
    model.config.use_cache = False
    attention.install(model, "sdpa")
    tuning = TuningSection(
        method="lora" if method == "dropout" else method, rank=3, dropout=0.3 if method == "dropout" else 0.0
    )
    tuned = apply_tuning(model, tuning, seed=0, compute=dtype)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    autocast = dtype if strategy not in (*CASTS_ITSELF, "hsdp") and dtype != torch.float32 else None
    packed = PackedCausalLM(tuned, choose_head("reference", "cpu")[1], autocast_dtype=autocast)
    layers = decoder_layers(causal_lm(tuned))
    make_optimizer = partial(build_optimizer, optim=OPTIM, lr=1e-3)
    replicas = 2 if strategy == "hsdp" else 1
    strategy = strategy.replace("hsdp", "fsdp2")
    return build_engine(
        strategy, packed.train(), layers, place, dtype, make_optimizer, offload=offload, dp_replicate=replicas
    )


def train(made: Engine, steps: range, accumulation: int, place: Runtime) -> list[StepResult]:
    return [
        train_step(
            made,
            load_step(step, accumulation, place),
            lr=1e-3 * (1 - step / 40),
            max_norm=MAX_NORM,
            seed=5,
            device=place.device,
            stop=False,
        )
        for step in steps
    ]


def logits(made: Engine) -> Tensor:
    """[1, 24, V] of one document, from the engine's own evaluation mode."""
    ids = np.arange(1, 25, dtype=np.int32)
    document = Documents((TokenizedExample(ids, np.ones(24, dtype=np.float32)),))
    batch = collate(document.packs, document, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8)
    with made.evaluating():
        hidden = made.packed.hidden_states(batch)
        return causal_lm(made.model).get_output_embeddings()(hidden).float().clone()


def resumed(case: str, path: Path, manager: CheckpointManager, accumulation: int, place: Runtime) -> list[StepResult]:
    """The rest of the run under the engine of `case`, from the checkpoint at `path`."""
    again = build(case, place)
    tensors = again.state()
    manager.load(path, tensors)
    again.adopt(tensors)
    set_step(again.optimizer, SAVED_AFTER)
    return train(again, range(SAVED_AFTER + 1, STEPS + 1), accumulation, place)


def run(case: str, folder: Path, place: Runtime) -> dict[str, list[float]]:
    """Twenty steps, a checkpoint on the way. Accumulation 1: resumed from it too, also by replicas; else,
    and in bf16, exported."""
    _, _, method, accumulation, compute = case.split("-")
    made, rounds = build(case, place), int(accumulation)
    manager = CheckpointManager(folder / f"{case}-{place.world_size}")
    before = train(made, range(1, SAVED_AFTER + 1), rounds, place)
    path = manager.save(SAVED_AFTER, made.state(), {"step": SAVED_AFTER})
    after = train(made, range(SAVED_AFTER + 1, STEPS + 1), rounds, place)
    found = {"straight": before + after, "after": after}
    if rounds == 1:
        found["resumed"] = resumed(case, path, manager, rounds, place)
        found["replicas"] = resumed(f"ddp-none-{method}-1-{compute}", path, manager, rounds, place)
    if place.world_size > 1 and (rounds > 1 or compute == "bfloat16"):
        export(made, folder / "exports" / case, place)
    return {
        f"{name}_{figure}": [getattr(result, figure) for result in results]
        for name, results in found.items()
        for figure in ("loss", "grad_norm")
    }


def export(made: Engine, out: Path, place: Runtime) -> None:
    """The Hugging Face or adapter folder, and the logits that it has to give when it is loaded again. The certificate
    wants the trainer's, bit for bit in fp32."""
    method = out.name.split("-")[2]
    expected = logits(made)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(out.parent / f"tokenizer-{place.rank}"))
    dtype = DTYPES[out.name.split("-")[-1]]
    base = Base(0, partial(untuned_base, method, dtype)) if is_adapter(made.model) else None
    package = package_of(made.model, Words(tokenizer, ""), base)
    probe = trained_probe(made, place.device, probe_limit(dtype, "cpu"))
    certificate = export_model(package, live_weights(made, torch.float32), out, probe, file_bytes=40_000)
    if place.is_main:
        assert certificate is not None
        assert dtype != torch.float32 or certificate.difference == 0.0
        save_file({"logits": expected}, out / "expected.safetensors")


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
