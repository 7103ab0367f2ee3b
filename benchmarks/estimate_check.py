"""Is `sft-dist estimate` right? Predicted against measured peak memory of real steps on CPU processes.

    python benchmarks/estimate_check.py [--out FILE]

Each case starts its ranks, builds a random Llama whose weights, gradients and moments are nearly all there is (a step
has 16 tokens), makes three optimizer steps of the real loop, saves a checkpoint, and reads the kernel's high-water mark
of resident memory. Before the model is built the libraries are warmed up and their memory is taken as zero. glibc is
told to give blocks of 64 KiB and more back at once (MALLOC_MMAP_THRESHOLD_): by default its heap keeps many of those
that FSDP2 frees, which is a property of the allocator and not of the states. About 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate_check.md"
LIMIT = 0.10
TOKENS = 16  # of a micro-batch: activations are nothing
MIB = 2**20
SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096},
    "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@dataclass(frozen=True, slots=True)
class Case:
    """One engine and method; `rounds` micro-batches per rank and step."""

    strategy: str
    method: str
    world_size: int
    rounds: int
    size: str = "large"
    tokens: int = TOKENS  # of a micro-batch

    @property
    def architecture(self) -> dict[str, Any]:
        return {"model_type": "llama", **SIZES[self.size], **HEADS}


CASES = (
    Case("ddp", "full", 1, 1),
    Case("ddp", "full", 2, 1),
    Case("ddp", "full", 2, 2),
    Case("fsdp2", "full", 2, 1),
    Case("fsdp2", "full", 2, 2),
    Case("fsdp2", "full", 1, 1),
    Case("ddp", "lora", 2, 1),
    Case("fsdp2", "lora", 2, 1),
    Case("zero1", "full", 2, 1),
    Case("zero2", "full", 2, 1),
    Case("zero3", "full", 2, 1),
)


def predict(case: Case) -> dict[str, int]:
    """Bytes of one rank at the peak of a step, and while it saves."""
    from sft_dist.config.schema import TuningSection
    from sft_dist.estimate.architecture import derive
    from sft_dist.estimate.memory import Layout, memory
    from sft_dist.estimate.tuning import tuned

    architecture = derive(case.architecture, "case")
    layout = Layout(case.strategy, case.world_size, "cpu", 4, 4, TOKENS, TOKENS - 1, case.rounds, False)
    phases = memory(architecture, tuned(architecture, TuningSection(method=case.method)), layout).device  # type: ignore[arg-type]
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    return {"step": max(size for name, size in sums.items() if name not in ("save", "export")), "save": sums["save"]}


def measure(case: Case) -> dict[str, float]:
    """The same two figures of rank 0, measured, with the seconds of a step and the FLOP/s of a matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(case, rank, folder) for rank in range(case.world_size)]
        outputs = [process.communicate(timeout=300) for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{case}: {errors[-2000:]}")
    found: dict[str, float] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def _start(case: Case, rank: int, folder: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(case.world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(case.world_size),
        "SFT_RENDEZVOUS": f"file://{folder}/rendezvous",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    }
    words = [case.strategy, case.method, *map(str, (case.world_size, case.rounds, case.size, case.tokens))]
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", folder, *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def work(case: Case, folder: str) -> None:
    """One rank. Prints its figures as JSON."""
    import torch

    from sft_dist.checkpoint.manager import CheckpointManager
    from sft_dist.estimate.hardware import matrix_flops
    from sft_dist.parallel.runtime import runtime

    with runtime() as place:
        torch.set_num_threads(1)
        shallow = case.architecture | {"num_hidden_layers": 1}
        engine = _engine(case, place, shallow)
        _steps(engine, place, case)
        del engine
        empty = _settle()
        engine = _engine(case, place, case.architecture)
        _settle()
        seconds = _steps(engine, place, case)
        found = {"step": _status("VmHWM") - empty, "seconds": seconds, "matrix_flops": matrix_flops()}
        manager = CheckpointManager(folder)
        _settle()
        manager.save(3, engine.state(), {})
        found["save"] = _status("VmHWM") - empty
        print(json.dumps(found), flush=True)
        del engine


def _engine(case: Case, place: Any, architecture: dict[str, Any]) -> Any:
    from functools import partial

    import torch
    from transformers import AutoConfig

    from sft_dist.config.schema import OptimSection, TuningSection
    from sft_dist.models import attention
    from sft_dist.models.adapters import apply_tuning
    from sft_dist.models.load import build_random
    from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers, pick_head
    from sft_dist.optim import build_optimizer
    from sft_dist.parallel.build import build_engine

    values = dict(architecture)
    model = build_random(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model.train(), "sdpa")
    tuned = apply_tuning(model, TuningSection(method=case.method), 0)  # type: ignore[arg-type]
    packed = PackedCausalLM(tuned, pick_head("auto", place.device)[1])
    make = partial(build_optimizer, optim=OptimSection(), lr=1e-4)
    return build_engine(case.strategy, packed, decoder_layers(causal_lm(tuned)), place, torch.float32, make)


def _steps(engine: Any, place: Any, case: Case) -> float:
    """Three optimizer steps through `train.train_step`; the seconds of the fastest."""
    import numpy as np

    from sft_dist.certify import Documents
    from sft_dist.data.collate import collate
    from sft_dist.data.loader import LoadedStep
    from sft_dist.train import train_step
    from sft_dist.types import StepPlan, TokenizedExample

    draw = np.random.default_rng(0)
    number = case.rounds * place.world_size
    examples = (draw.integers(0, 4096, case.tokens, dtype=np.int32) for _ in range(number))
    documents = Documents(tuple(TokenizedExample(ids, np.ones(case.tokens, np.float32)) for ids in examples))
    cuts = tuple((pack,) for pack in documents.packs)
    mine = tuple(range(place.rank, number, place.world_size))
    batches = tuple(collate(cuts[i], documents, packing="best_fit", pad_token_id=0, pad_to_multiple_of=8) for i in mine)
    seconds = []
    for step in (1, 2, 3):  # DDP's rebuilt buckets are whole from the third on
        loaded, begin = LoadedStep(StepPlan(step, 0, cuts), batches, mine, ""), time.perf_counter()
        train_step(engine, loaded, lr=1e-4, max_norm=1.0, seed=0, device=place.device, stop=False)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _settle() -> int:
    """Give back what is free, set the high-water mark to what is left and return it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def efficiency(case: Case, found: dict[str, float]) -> float:
    """FLOP/s of a step over those of a matrix product, in one thread."""
    from sft_dist.config.schema import TuningSection
    from sft_dist.estimate.architecture import derive
    from sft_dist.estimate.pace import step_flops
    from sft_dist.estimate.tuning import tuned

    architecture = derive(case.architecture, "case")
    flops = step_flops(
        architecture,
        tuned(architecture, TuningSection(method=case.method)),  # type: ignore[arg-type]
        num_tokens=case.tokens,
        sum_squared_lengths=case.tokens**2,
        num_loss_tokens=case.tokens - 1,
    )
    return flops / found["seconds"] / found["matrix_flops"]


def speed() -> str:
    """A line about the time of a step."""
    timed = Case("ddp", "full", 1, 1, tokens=1024)
    found = measure(timed)
    return (
        f"\nA step of {timed.tokens} tokens, one process and thread: {found['seconds']:.2f} s, "
        f"{efficiency(timed, found):.2f} of the FLOP/s of the fastest of many float32 matrix products "
        f"({found['matrix_flops'] / 1e9:.0f} GFLOP/s).\n"
    )


def table(rows: list[tuple[Case, dict[str, int], dict[str, float]]]) -> str:
    """The result file."""
    text = [
        "# Estimated against measured memory",
        "",
        f"`python benchmarks/estimate_check.py`, {datetime.date.today()}, {platform.machine()}, torch "
        f"{version('torch')}, transformers {version('transformers')}, float32, gloo. MiB of rank 0 above the warmed-up",
        f"libraries; micro-batches of {TOKENS} tokens, so that states and what engines gather are nearly all. The "
        f"limit is {LIMIT:.0%} on the peak of a step. `micro-batches` is their number per rank and step.",
        "",
        "| engine | method | ranks | micro-batches | step: predicted | measured | error | save: predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, told, found in rows:
        error = told["step"] / found["step"] - 1
        sizes = [f"{sizes[name] / MIB:.0f}" for name in ("step", "save") for sizes in (told, found)]
        text.append(
            f"| {case.strategy} | {case.method} | {case.world_size} | {case.rounds} | {sizes[0]} | {sizes[1]} | "
            f"{error:+.1%} | {sizes[2]} | {sizes[3]} |"
        )
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, strategy, method, world_size, rounds, size, tokens = args.worker
        work(Case(strategy, method, int(world_size), int(rounds), size, int(tokens)), folder)
        return 0
    rows = []
    for case in CASES:
        rows.append((case, predict(case), measure(case)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    args.out.write_text(table(rows) + speed())
    return int(any(abs(told["step"] / found["step"] - 1) > LIMIT for _, told, found in rows))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    sys.exit(main())
