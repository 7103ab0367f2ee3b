"""What does a long document cost each process when its row is cut among k of them? Measured on a CPU, one step each.

    python benchmarks/sequence_memory.py [--tokens 4096] [--out FILE]

`kept` is what autograd keeps between forward and backward: bytes of distinct storages, parameters left out. `peak` is
how far the step raises the process's resident memory above the built model. `trains` says whether the step succeeds
when the kernel allows each process so much memory above the built model, and no more (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixes import header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from sft_dist.certify import Documents
from sft_dist.config.schema import OptimSection
from sft_dist.data.collate import collate
from sft_dist.models import attention
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.optim import build_optimizer
from sft_dist.parallel.build import build_engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.parallel.sequence import sequence_group
from sft_dist.resilience.ending import run_and_end
from sft_dist.types import TokenizedExample
from sft_kernels import choose_head

RESULT = Path(__file__).parent / "results" / "sequence_memory.md"
SIZES = (1, 2, 4)
MIB = 2**20
ARCHITECTURE = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2**20,
}  # fmt: skip


def worker(tokens: int, budget_mib: int, out: Path) -> int:
    """One rank. Returns 0."""
    with runtime() as place:
        found = one_step(place, tokens, budget_mib)  # and its engine is gone before the process group, or gloo hangs
        (out / f"{place.rank}.json").write_text(json.dumps(found))
    return 0


def one_step(place: Runtime, tokens: int, budget_mib: int) -> dict[str, float]:
    """Build, then one forward and backward pass of a single document of `tokens` tokens: MiB of `kept` and `peak`."""
    from transformers import AutoConfig

    torch.set_num_threads(1)
    sequence = sequence_group(place.world_size, place)
    model = build_random(AutoConfig.for_model("llama", **ARCHITECTURE), dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa", sequence.across)
    packed = PackedCausalLM(model, choose_head("reference", "cpu")[1])
    optimizer = partial(build_optimizer, optim=OptimSection(), lr=1e-3)
    engine = build_engine("ddp", packed.train(), decoder_layers(causal_lm(model)), place, torch.float32, optimizer)
    engine.forward(sequence.cut(document(8 * sequence.size))).backward()  # what a first step allocates once
    if budget_mib:
        limit = memory("VmData") + budget_mib * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, kept = memory("VmRSS"), Kept(engine.packed)
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            loss = engine.forward(sequence.cut(document(tokens)))
        loss.backward()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)  # without memory there is no end in order
    return {"kept": kept.num_bytes / MIB, "peak": (memory("VmHWM") - before) / MIB}


class Kept:
    """Counts distinct storages that autograd keeps, without those of parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.num_bytes, self._seen = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


def document(tokens: int) -> Any:
    """A micro-batch of one document, a tenth of it learned."""
    ids = np.random.default_rng(0).integers(0, ARCHITECTURE["vocab_size"], tokens, dtype=np.int32)
    probe = Documents((TokenizedExample(ids, (np.arange(tokens) % 10 == 9).astype(np.float32)),))
    return collate(probe.packs, probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8)


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def measure(tokens: int, size: int, budget_mib: int = 0) -> list[dict[str, float]] | None:
    """What each rank found; None when one could not allocate."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, "--tokens", str(tokens), "--budget", str(budget_mib)]
        place = {"WORLD_SIZE": str(size), "SFT_RENDEZVOUS": f"file://{folder}/meet", "CUDA_VISIBLE_DEVICES": ""}
        ranks = [
            subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        errors = [rank.communicate()[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            if not any("allocate memory" in error for error in errors):
                raise RuntimeError("\n".join(errors))
            return None
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_and_end(lambda: worker(args.tokens, args.budget, args.worker))
    found = {size: measure(args.tokens, size) for size in SIZES}
    assert all(found.values())
    peaks = {size: max(rank["peak"] for rank in ranks or []) for size, ranks in found.items()}
    budget = int((peaks[1] + peaks[2]) / 2)
    lines = header("Sequence parallel: memory of a long document", "python benchmarks/sequence_memory.py", ("torch",))
    lines += [
        f"One document of {args.tokens:,} tokens, llama with {ARCHITECTURE['num_hidden_layers']} layers of "
        f"{ARCHITECTURE['hidden_size']}, float32, no activation checkpointing, gradients replicated.",
        "MiB of the process that needs most; the last column is about a limit for every process.",
        "",
        f"| k | tokens a process | kept for backward | of k = 1 | peak above the model | trains within {budget} MiB |",
        "|---|---|---|---|---|---|",
    ]
    whole = max(rank["kept"] for rank in found[1] or [])
    for size, ranks in found.items():
        kept = max(rank["kept"] for rank in ranks or [])
        fits = "no: cannot allocate" if measure(args.tokens, size, budget) is None else "yes"
        lines.append(
            f"| {size} | {args.tokens // size:,} | {kept:,.0f} | {kept / whole:.3f} | {peaks[size]:,.0f} | {fits} |"
        )
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
