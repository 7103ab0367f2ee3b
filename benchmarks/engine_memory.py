"""What does one rank of each engine hold? Measured on CPU processes, with a model whose states are nearly all there is.

    python benchmarks/engine_memory.py [--out FILE] [--only fsdp2]

One start for each number of ranks. Each case builds a random Llama of 32 M weights (512 MB of fp32 weights, gradients
and moments in one process), makes three optimizer steps of the real loop on micro-batches of 16 tokens, and reads the
kernel's figures of resident memory on every rank, above what was there before it: **held** between steps (weights,
moments, what an engine keeps for communication) and the **peak** of a step (gradients and gathered layers too). Figures
are the fullest rank's. The columns "x N" give N times a rank's share over what the same engine holds in one process: 1
where everything is shared, N where nothing is. glibc is told to give blocks back at once, as in `estimate_check.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from estimate_check import HEADS, MIB, ROOT, SIZES, _settle, _status, _steps

RESULT = ROOT / "benchmarks" / "results" / "engine_memory.md"
SHARED = ("fsdp2", "zero3")  # everything: must shrink as 1/N
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LIMIT = 0.10


@dataclass(frozen=True, slots=True)
class Case:
    """One engine; `rounds` micro-batches per rank and step."""

    strategy: str
    world_size: int
    rounds: int = 1
    dp_replicate: int = 1
    tokens: int = 16

    @property
    def name(self) -> str:
        mesh = f" {self.dp_replicate} x {self.world_size // self.dp_replicate}" if self.dp_replicate > 1 else ""
        return self.strategy + mesh


CASES = (
    *(Case(strategy, 1) for strategy in STRATEGIES),
    *(Case(strategy, 2) for strategy in STRATEGIES),
    *(Case(strategy, 4) for strategy in STRATEGIES),
    Case("fsdp2", 4, rounds=4),
    Case("fsdp2", 4, dp_replicate=2),
)


def measure(cases: list[Case]) -> list[dict[str, float]]:
    """MiB of the fullest rank, {held, peak}, of each of `cases`, which have one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(cases, rank, folder) for rank in range(cases[0].world_size)]
        outputs = [process.communicate(timeout=540) for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{cases}: {errors[-2000:]}")
    by_rank = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    return [
        {name: max(rank[name] for rank in found) / MIB for name in ("held", "peak")}
        for found in zip(*by_rank, strict=True)
    ]


def _start(cases: list[Case], rank: int, folder: str) -> subprocess.Popen[str]:
    world_size = str(cases[0].world_size)
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": world_size,
        "SFT_RENDEZVOUS": f"file://{folder}/rendezvous",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    }
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps([asdict(case) for case in cases])],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def work(cases: list[Case]) -> None:
    """One rank. Prints bytes as JSON."""
    import torch

    from sft_dist.parallel.runtime import runtime

    with runtime() as place:
        torch.set_num_threads(1)
        print(json.dumps([_memory(case, place) for case in cases]), flush=True)


def _memory(case: Case, place: Any) -> dict[str, int]:
    architecture = {"model_type": "llama", **SIZES["large"], **HEADS}
    engine = _engine(case, place, architecture | {"num_hidden_layers": 1})  # what the first of its kind allocates
    _steps(engine, place, case)  # type: ignore[arg-type]
    del engine
    empty = _settle()
    engine = _engine(case, place, architecture)
    _settle()
    _steps(engine, place, case)  # type: ignore[arg-type]
    peak = _status("VmHWM") - empty
    return {"peak": peak, "held": _settle() - empty}


def _engine(case: Case, place: Any, architecture: dict[str, Any]) -> Any:
    from functools import partial

    import torch
    from transformers import AutoConfig

    from sft_dist.config.schema import OptimSection
    from sft_dist.models import attention
    from sft_dist.models.load import build_random
    from sft_dist.models.packed import PackedCausalLM, decoder_layers, pick_head
    from sft_dist.optim import build_optimizer
    from sft_dist.parallel.build import build_engine

    values = dict(architecture)
    model = build_random(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32, seed=0)
    model.config.use_cache = False
    attention.install(model.train(), "sdpa")
    packed = PackedCausalLM(model, pick_head("auto", place.device)[1])
    make = partial(build_optimizer, optim=OptimSection(), lr=1e-4)
    layers = decoder_layers(model)
    return build_engine(case.strategy, packed, layers, place, torch.float32, make, dp_replicate=case.dp_replicate)


def table(rows: list[tuple[Case, dict[str, float]]]) -> str:
    """The result file."""
    text = [
        "# Memory of one rank, by engine",
        "",
        f"`python benchmarks/engine_memory.py`, {datetime.date.today()}, {platform.machine()}, torch "
        f"{version('torch')}, deepspeed {version('deepspeed')}, float32, gloo, full tuning of 32 M weights. MiB of the",
        "fullest rank above the warmed-up libraries, as the kernel counts resident memory.",
        "",
        "| engine | ranks N | micro-batches | held between steps | x N | peak of a step | x N |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in rows:
        alone = _alone(case, rows)
        shares = [found[name] * case.world_size / alone[name] for name in ("held", "peak")]
        text.append(
            f"| {case.name} | {case.world_size} | {case.rounds} | {found['held']:.0f} | {shares[0]:.2f} | "
            f"{found['peak']:.0f} | {shares[1]:.2f} |"
        )
    return "\n".join(text) + "\n"


def faults(rows: list[tuple[Case, dict[str, float]]]) -> list[str]:
    """Engines that share everything and hold more than 1/N and LIMIT of it."""
    return [
        f"{case.name} on {case.world_size}: {found['held']:.0f} MiB of {_alone(case, rows)['held']:.0f}"
        for case, found in rows
        if case.strategy in SHARED
        and abs(found["held"] * case.world_size / case.dp_replicate / _alone(case, rows)["held"] - 1) > LIMIT
    ]


def _alone(case: Case, rows: list[tuple[Case, dict[str, float]]]) -> dict[str, float]:
    """What the engine of `case` takes in one process."""
    return next(found for other, found in rows if other.strategy == case.strategy and other.world_size == 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", default="", help="engines whose name begins so")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work([Case(**case) for case in json.loads(args.worker)])
        return 0
    rows = []
    asked = [case for case in CASES if case.strategy.startswith(args.only)]
    for _, same_world in groupby(asked, key=lambda case: case.world_size):
        cases = list(same_world)
        for case, found in zip(cases, measure(cases), strict=True):
            rows.append((case, found))
            print(case.name, case.world_size, case.rounds, found, flush=True)
    args.out.write_text(table(rows))
    for line in faults(rows):
        print(f"more than 1/N: {line}")
    return bool(faults(rows))


if __name__ == "__main__":
    sys.exit(main())
