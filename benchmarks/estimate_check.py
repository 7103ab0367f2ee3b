"""Is `sft-dist estimate` right? Predicted against measured peak memory of real steps on CPU processes.

    python benchmarks/estimate_check.py [--out FILE]

Each case starts its ranks, builds a random Llama whose weights, gradients and moments are nearly all there is (a step
has 16 tokens), makes three optimizer steps of the real loop, saves a checkpoint and waits for it, makes three steps
while another one is written in the background, exports the model, and reads the kernel's high-water mark of resident
memory after each. Before the model is built the libraries are warmed up, with a smaller model that does all of the
same, and their memory is taken as zero. glibc is told to give blocks of 64 KiB and more back at once
(MALLOC_MMAP_THRESHOLD_): by default its heap keeps many of those that FSDP2 frees, which is a property of the allocator
and not of the states. About 6 minutes on two cores.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate_check.md"
LIMIT = 0.10
SLACK_BYTES = 16 * 2**20  # what libraries allocate on the way: 8 to 12 MiB in a save, of whatever size
ABOVE = {"saving": 0.30}  # an upper bound, as if the fullest moments of step and file came together
TOKENS = 16  # of a micro-batch: activations are nothing
MIB = 2**20
SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096},
    "large": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
PHASES = ("step", "save", "saving", "export")


@dataclass(frozen=True, slots=True)
class Case:
    """One engine and method; `rounds` micro-batches per rank and step."""

    strategy: str
    method: str
    world_size: int
    rounds: int
    size: str = "large"
    tokens: int = TOKENS  # of a micro-batch
    dp_replicate: int = 1
    offload: str = "none"
    phases: tuple[str, ...] = PHASES  # to be measured

    @property
    def name(self) -> str:
        """The engine, with its mesh or what it offloads."""
        mesh = f" {self.dp_replicate} x {self.world_size // self.dp_replicate}" if self.dp_replicate > 1 else ""
        return self.strategy + mesh + (f", {self.offload} offloaded" if self.offload != "none" else "")

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
    Case("fsdp2", "full", 4, 1, dp_replicate=2),
    Case("fsdp2", "qlora", 2, 1, phases=PHASES[:3]),  # its base is not in files here, so it is not read in pieces
    Case("zero2", "full", 2, 1, offload="optimizer"),
    Case("zero3", "full", 2, 1, offload="params"),
)


def predict(case: Case) -> dict[str, int]:
    """Bytes of one rank at the peak of each of PHASES."""
    from sft_dist.estimate.architecture import derive
    from sft_dist.estimate.layout import Layout
    from sft_dist.estimate.memory import memory
    from sft_dist.estimate.tuning import tuned

    architecture = derive(case.architecture, "case")
    layout = Layout(
        case.strategy, case.world_size, "cpu", 4, 4, TOKENS, TOKENS - 1, case.rounds, False,
        offload=case.offload, dp_replicate=case.dp_replicate, saves_in_background=True,
    )  # fmt: skip
    phases = memory(architecture, tuned(architecture, tuning(case)), layout).device
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    steps = max(size for name, size in sums.items() if name not in PHASES)
    return {"step": steps, **{name: sums[name] for name in PHASES[1:]}}


def tuning(case: Case) -> Any:
    """The recipe's section."""
    from sft_dist.config.schema import TuningSection

    return TuningSection(method=case.method)  # type: ignore[arg-type]


def measure(case: Case) -> dict[str, float]:
    """The same figures of rank 0, measured, with the seconds of a step and the FLOP/s of a matrix product."""
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
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", folder, json.dumps(asdict(case))],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def work(case: Case, folder: Path) -> None:
    """One rank. Prints its figures as JSON."""
    import torch

    from sft_dist.estimate.hardware import matrix_flops
    from sft_dist.parallel.runtime import runtime

    with runtime() as place:
        torch.set_num_threads(1)
        _peaks(case, case.architecture | {"num_hidden_layers": 1}, place, folder / "warm", 0)
        empty = _settle()
        found = _peaks(case, case.architecture, place, folder / "run", empty)
        print(json.dumps(found | {"matrix_flops": matrix_flops()}), flush=True)


def _peaks(case: Case, architecture: dict[str, Any], place: Any, folder: Path, empty: int) -> dict[str, float]:
    """Bytes above `empty` at the peak of each of PHASES, and the seconds of a step."""
    from sft_dist.checkpoint.background import BackgroundSaver
    from sft_dist.checkpoint.manager import CheckpointManager

    engine = _engine(case, place, architecture)
    _settle()
    found = {"seconds": _steps(engine, place, case)}
    found["step"] = _status("VmHWM") - empty
    if case.phases == ("step",):
        return found
    saver = BackgroundSaver(CheckpointManager(folder))
    _settle()
    saver.save(3, engine.state(), {})
    found["save"] = _status("VmHWM") - empty
    _settle()
    saver.begin(6, engine.state(), {})
    _steps(engine, place, case)
    saver.commit()
    found["saving"] = _status("VmHWM") - empty
    if "export" not in case.phases:
        return found
    saver.save(7, engine.state(), {})  # as a run ends: the copy is given back
    _settle()
    _export(case, engine, place, architecture, folder)
    found["export"] = _status("VmHWM") - empty
    return found


def _export(case: Case, engine: Any, place: Any, architecture: dict[str, Any], folder: Path) -> None:
    """As a run does it, into files of a tensor each: a file that is read back is mapped, which counts as memory."""
    from functools import partial

    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from sft_dist.checkpoint.export import export_model, package_of, probe_limit
    from sft_dist.checkpoint.export_certificate import Base, Words
    from sft_dist.checkpoint.weights import live_weights
    from sft_dist.milestones import trained_probe

    words = Words(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), "")
    load = partial(_base, case, architecture)
    package = package_of(engine.model, words, None if case.method == "full" else Base(0, load))
    probe = trained_probe(engine, place.device, probe_limit(torch.float32, "cpu"))
    export_model(package, live_weights(engine, torch.float32), folder / "export", probe, file_bytes=1)


def _base(case: Case, architecture: dict[str, Any]) -> Any:
    """The model before it is tuned, with stock attention; a 4-bit one for qlora."""
    import torch
    from transformers import AutoConfig

    from sft_dist.models.load import build_random
    from sft_dist.models.quantise import quantise

    values = dict(architecture)
    model = build_random(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32, seed=0)
    return quantise(model, torch.float32) if case.method == "qlora" else model


def _model(case: Case, architecture: dict[str, Any]) -> Any:
    """The base with attention that knows segments."""
    from sft_dist.models import attention

    model = _base(case, architecture)
    model.config.use_cache = False
    attention.install(model.train(), "sdpa")
    return model


def _engine(case: Case, place: Any, architecture: dict[str, Any]) -> Any:
    from functools import partial

    import torch

    from sft_dist.config.schema import OptimSection
    from sft_dist.models.adapters import apply_tuning
    from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers, pick_head
    from sft_dist.optim import build_optimizer
    from sft_dist.parallel.build import build_engine

    tuned = apply_tuning(_model(case, architecture), tuning(case), 0)
    packed = PackedCausalLM(tuned, pick_head("auto", place.device)[1])
    make = partial(build_optimizer, optim=OptimSection(), lr=1e-4)
    layers = decoder_layers(causal_lm(tuned))
    options = {"offload": case.offload, "dp_replicate": case.dp_replicate}
    return build_engine(case.strategy, packed, layers, place, torch.float32, make, **options)


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
    from sft_dist.estimate.architecture import derive
    from sft_dist.estimate.pace import step_flops
    from sft_dist.estimate.tuning import tuned

    architecture = derive(case.architecture, "case")
    flops = step_flops(
        architecture,
        tuned(architecture, tuning(case)),
        num_tokens=case.tokens,
        sum_squared_lengths=case.tokens**2,
        num_loss_tokens=case.tokens - 1,
    )
    return flops / found["seconds"] / found["matrix_flops"]


def speed() -> str:
    """A line about the time of a step."""
    timed = Case("ddp", "full", 1, 1, tokens=1024, phases=("step",))
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
        f"limit is {LIMIT:.0%}. `micro-batches` is their number per rank and step; cells say predicted / measured.",
        f"{SLACK_BYTES // MIB} MiB are for what libraries allocate on the way. `save` is waited for, `saving` goes on "
        "in the background of later steps (`checkpoint.async`), an upper bound: as if the fullest moments of step and",
        "file came together.",
        "",
        f"| engine | method | ranks | micro-batches | {' | '.join(PHASES)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, told, found in rows:
        cells = [cell(told, found, phase) for phase in PHASES]
        text.append(f"| {case.name} | {case.method} | {case.world_size} | {case.rounds} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def cell(told: dict[str, int], found: dict[str, float], phase: str) -> str:
    """MiB predicted / measured."""
    if phase not in found:
        return f"{told[phase] / MIB:.0f} / –"
    return f"{told[phase] / MIB:.0f} / {found[phase] / MIB:.0f} ({error(told, found, phase):+.1%})"


def error(told: dict[str, int], found: dict[str, float], phase: str) -> float:
    """By which share of what was measured the prediction is off."""
    return told[phase] / found[phase] - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        given = json.loads(args.worker[1])
        work(Case(**given | {"phases": tuple(given["phases"])}), Path(args.worker[0]))
        return 0
    rows = []
    for case in CASES:
        if case.name.startswith(args.only or ""):
            rows.append((case, predict(case), measure(case)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    if not args.only:
        args.out.write_text(table(rows) + speed())
    return int(not all(is_right(told, found, phase) for _, told, found in rows for phase in found.keys() & PHASES))


def is_right(told: dict[str, int], found: dict[str, float], phase: str) -> bool:
    """Whether a prediction is good enough."""
    if abs(told[phase] - found[phase]) <= SLACK_BYTES:
        return True
    return -LIMIT <= error(told, found, phase) <= ABOVE.get(phase, LIMIT)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    sys.exit(main())
