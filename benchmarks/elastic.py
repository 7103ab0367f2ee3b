"""What do bits that no number of ranks can change cost, beside plain FSDP2?

    python benchmarks/elastic.py [--repeats 8] [--out FILE]

Two gloo ranks, one thread each, a random Llama of 7 M parameters, micro-batches of 512 tokens. Both engines live in the
same processes and take turns step by step, so that other work on the machine meets both alike. Time is the slower
rank's; gradient memory is what one rank holds of gradients at its peak, counted in the sharded and unsharded tensors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mixes import header
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from sft_dist.certify import Documents
from sft_dist.config.schema import OptimSection, TuningSection
from sft_dist.data.collate import collate
from sft_dist.data.loader import LoadedStep
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.optim import build_optimizer
from sft_dist.parallel.build import build_engine
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.engine import local_part as local
from sft_dist.parallel.exact import TreeSum
from sft_dist.parallel.runtime import runtime
from sft_dist.train import train_step
from sft_dist.types import StepPlan, TokenizedExample
from sft_kernels import choose_head

RESULT = Path(__file__).parent / "results" / "elastic.md"
RANKS, TOKENS, VOCAB = 2, 512, 4096
MODEL = LlamaConfig(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=TOKENS, tie_word_embeddings=True,
)  # fmt: skip


def engine(method: str, exact: bool, place) -> Engine:
    model = build_random(MODEL, dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa")
    tuned = apply_tuning(model, TuningSection(method=method, rank=16), 0)
    packed = PackedCausalLM(tuned, choose_head("reference", "cpu")[1])
    layers, optimizer = decoder_layers(causal_lm(tuned)), partial(build_optimizer, optim=OptimSection(), lr=1e-4)
    return build_engine("fsdp2", packed.train(), layers, place, torch.float32, optimizer, exact=exact)


def load(accumulation: int, rank: int) -> LoadedStep:
    rng = np.random.default_rng(1)
    number = RANKS * accumulation
    ids = rng.integers(0, VOCAB, (number, TOKENS), dtype=np.int32)
    documents = Documents(tuple(TokenizedExample(row, np.ones(TOKENS, dtype=np.float32)) for row in ids))
    cuts = tuple((pack,) for pack in documents.packs)
    mine = range(rank, number, RANKS)
    batches = [collate(cuts[i], documents, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8) for i in mine]
    return LoadedStep(StepPlan(1, 0, cuts), tuple(batches), tuple(mine), "")


def measure_memory(made: Engine, loaded: LoadedStep, step) -> float:
    """Gradients at their peak after a backward pass, MiB: the tree's partial sums, the parameters' own."""
    peak = 0
    add = TreeSum.add

    def bytes_of(tensors) -> int:
        return sum(local(t).numel() * t.element_size() for t in tensors)

    def counted(self, tensors) -> None:
        nonlocal peak
        held = sum(bytes_of(part) for _, part in self._partial) + bytes_of(tensors)
        peak = max(peak, held)
        add(self, tensors)

    TreeSum.add = counted
    try:
        step(made, loaded)
    finally:
        TreeSum.add = add
    return peak / 2**20


def run(rank: int, folder: Path, repeats: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    os.environ["SFT_RENDEZVOUS"] = f"file://{folder}/rendezvous"
    rows = []
    with runtime(num_threads=1) as place:

        def step(made: Engine, loaded: LoadedStep) -> float:
            dist.barrier()
            begun = time.perf_counter()
            train_step(made, loaded, lr=1e-4, max_norm=1.0, seed=0, device=place.device, stop=False)
            slowest = torch.tensor(time.perf_counter() - begun)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            return float(slowest)

        for method in ("full", "lora"):
            plain, exact = engine(method, False, place), engine(method, True, place)
            shard = sum(local(p).numel() * 4 for p in plain.trained.values()) / 2**20
            for accumulation in (1, 4, 8):
                loaded = load(accumulation, rank)
                memory = measure_memory(exact, loaded, step)
                step(plain, loaded)
                times = [(step(plain, loaded), step(exact, loaded)) for _ in range(repeats)]
                ratio = statistics.median(b / a for a, b in times)
                usual = statistics.median(a for a, _ in times)
                whole = shard * (RANKS if accumulation > 1 else 1)
                rows.append(f"| {method} | {accumulation} | {usual:.2f} | {ratio:.2f} | {whole:.1f} | {memory:.1f} |")
        if rank == 0:
            out.write_text(report(rows, repeats))
        dist.barrier()
    os._exit(0)


def report(rows: list[str], repeats: int) -> str:
    lines = header("Bits that no number of ranks changes: cost", "python benchmarks/elastic.py", ("torch",))
    lines += [
        f"Two gloo ranks, one thread each, 7 M parameters, {TOKENS} tokens a micro-batch, {repeats} steps of each",
        "engine in turns. Other work ran on the machine: the ratio is the figure. Gradient memory is of one rank:",
        "plain FSDP2 keeps whole gradients while it accumulates, the tree keeps shards, one for each level.",
        "",
        "| tuning | micro-batches a rank | plain, s a step | elastic / plain | gradients plain, MiB | elastic, MiB |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        mp.spawn(run, (Path(name), options.repeats, options.out), nprocs=RANKS)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
