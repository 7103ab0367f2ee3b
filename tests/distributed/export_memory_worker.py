"""One rank: how much memory an export takes beside the training state, streamed and, to see it, gathered whole.

`python export_memory_worker.py FOLDER STRATEGY` writes FOLDER/STRATEGY-RANK.json with bytes.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from tiny_run import write_tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sft_dist.checkpoint.export import export_model, package_of, probe_limit
from sft_dist.checkpoint.export_certificate import Words
from sft_dist.checkpoint.weights import live_weights
from sft_dist.config.schema import OptimSection
from sft_dist.milestones import trained_probe
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.optim import build_optimizer
from sft_dist.parallel.build import build_engine
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.resilience.ending import run_and_end
from sft_kernels import choose_head

FILE_BYTES = 8 << 20  # mapped while it is read back, so part of the peak
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


class Peak:
    """Growth of this process's resident memory at its highest, as the kernel counts it."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._start = self._read("VmRSS")
        self.growth = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = self._read("VmHWM") - self._start

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def build(strategy: str, place: Runtime) -> Engine:
    model = build_random(CONFIG, dtype=torch.float32, seed=0)
    model.config.use_cache = False
    packed = PackedCausalLM(model, choose_head("reference", "cpu")[1])
    make_optimizer = partial(build_optimizer, optim=OptimSection(), lr=1e-3)
    return build_engine(strategy, packed, decoder_layers(causal_lm(model)), place, torch.float32, make_optimizer)


def export(made: Engine, out: Path, place: Runtime) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(write_tokenizer(out.parent / f"tokenizer-{place.rank}"))
    package = package_of(made.model, Words(tokenizer, ""))
    probe = trained_probe(made, place.device, probe_limit(torch.float32, "cpu"))
    export_model(package, live_weights(made, torch.float32), out, probe, file_bytes=FILE_BYTES)


def main(folder: Path, strategy: str) -> None:
    with runtime() as place:
        torch.set_num_threads(1)
        made = build(strategy, place)
        export(made, folder / f"warm-{strategy}", place)  # imports and first allocations are not the export's
        with Peak() as streamed:
            export(made, folder / f"export-{strategy}", place)
        with Peak() as whole:
            gathered = {
                name: made.whole(tensor).clone() for name, tensor in made.model.state_dict(keep_vars=True).items()
            }
        model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in gathered.values())
        found = {"model": model_bytes, "streamed": streamed.growth, "whole": whole.growth}
        (folder / f"{strategy}-{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1]), sys.argv[2]))
