"""One rank: the same model loaded whole and read shard by shard; bits, two steps, and the peak of memory of each.

`python weight_files_worker.py FOLDER CASE ...`; FOLDER holds `untied` and `tied`, pretrained models, and `large`.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import zero_worker
from torch import Tensor

from sft_dist.assembly import spread
from sft_dist.config.auto import Choices
from sft_dist.config.schema import ModelSection, Recipe
from sft_dist.models.base import load_base
from sft_dist.models.packed import causal_lm
from sft_dist.models.quantise import quantise
from sft_dist.network import build_empty_network, build_network
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.resilience.ending import run_and_end

MIB = 2**20
STRATEGIES = ("fsdp2", "zero3")
KINDS = (("full", "float32"), ("lora", "float32"), ("lora", "bfloat16"), ("full", "bfloat16"))  # method, compute
CASES = ["-".join((strategy, name, *kind)) for strategy, name, kind in product(STRATEGIES, ("untied", "tied"), KINDS)]
CASES += [f"fsdp2-untied-dora-{compute}" for compute in ("float32", "bfloat16")]  # zero3 refuses it


def recipe(path: Path, method: str, strategy: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(path)},
            "data": {"sources": [{"path": "d.json"}]},
            "tuning": {"method": method, **({} if method == "full" else {"rank": 2})},
            "parallel": {"strategy": strategy},
        }
    )


def build(asked: Recipe, place: Runtime, compute: str, empty: bool) -> Engine:
    make: Any = build_empty_network if empty else build_network
    network = make(asked, getattr(torch, compute), place.device, vocab_size=8)
    assert (network.files is not None) == empty
    return spread(network, asked, Choices(1, 4, 1e-3, asked.parallel.strategy, "none", compute), place)


def digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        data = local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode() + data)
    return total.hexdigest()


def facts(made: Engine, place: Runtime) -> dict[str, Any]:
    """Everything of the model that this rank holds, and what two steps give."""
    model = made.model
    lm = causal_lm(model)
    found = {
        "parameters": digest({name: getattr(p, "ds_tensor", p) for name, p in model.named_parameters()}),
        "state": digest(made.state()),
        "buffers": digest(dict(model.named_buffers())),
        "names": [sorted(dict(model.named_parameters())), sorted(made.state())],
        "tied": lm.get_input_embeddings().weight is lm.get_output_embeddings().weight,
        "generation": lm.generation_config.to_json_string(),
    }
    results = zero_worker.train(made, range(1, 3), 1, place)
    return found | {"losses": [(r.loss, r.grad_norm) for r in results]}


def peak_mib(make: Callable[[], object]) -> float:
    """Largest resident memory meanwhile, above what was there before. The kernel counts."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = make()
    peak = status("VmHWM") - before
    del made
    return peak


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main(folder: Path, cases: list[str]) -> None:
    found: dict[str, Any] = {}
    with runtime() as place:
        torch.set_num_threads(1)
        for case in cases:
            strategy, name, method, compute = case.split("-")
            asked = recipe(folder / name, method, strategy)
            pair = [facts(build(asked, place, compute, empty), place) for empty in (False, True)]
            found[case] = pair
        for strategy in STRATEGIES:
            asked = recipe(folder / "large", "lora", strategy)
            made = {how: partial(build, asked, place, "float32", how == "files") for how in ("files", "whole")}
            found[f"peaks-{strategy}"] = {how: peak_mib(make) for how, make in made.items()}
        large = ModelSection(path=str(folder / "large"))
        load = partial(load_base, large, dtype=torch.float32, seed=0, vocab_size=0)
        found["peaks-4-bit"] = {
            "files": peak_mib(partial(load, four_bits=True)),
            "whole": peak_mib(lambda: quantise(load(four_bits=False), torch.float32)),
        }
        (folder / f"found-{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
