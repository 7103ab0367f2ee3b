"""How fast is the loss head on a CPU, forward and backward, against what people use?

    python benchmarks/head_cpu.py [--repeats 5] [--threads 2] [--clock wall|cpu] [--out FILE]

Peers, each on the same tensors: plain logits + `F.cross_entropy` (the tests' yardstick), and the LM head that TRL's
SFTTrainer installs, called as its trainer calls it on a CPU (every position, with the entropy and top-1 it logs).
Calls are interleaved round by round and gradients of all heads are compared before a time is believed. Under 2 minutes
on two quiet cores. On a machine that others use too, `--threads 1 --clock cpu` counts the CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from sft_kernels import head_plain, head_reference

RESULT = Path(__file__).parent / "results" / "head_cpu.md"
# (tokens T, width D, vocabulary V, supervised share p)
SHAPES = [(1024, 1024, 32_000, 0.35), (2048, 512, 49_152, 0.35), (1024, 1024, 32_000, 1.0)]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TARGETS = {0.35: {"plain": 2.0, "trl": 5.0}, 1.0: {"plain": 0.95, "trl": 2.0}}


def trl_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor, *, num_loss_tokens: int
) -> Tensor:  # fmt: skip
    """TRL's fused LM head with the arguments of `SFTTrainer` on a device without Triton; knows no token weights."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0,
        ("log_probs", "entropy", "is_top1"),
    )  # fmt: skip
    return -log_probs.masked_fill(labels == -100, 0).sum()


HEADS: dict[str, Callable[..., Tensor]] = {
    "ours": head_reference.supervised_loss,
    "plain": head_plain.supervised_loss,
    "trl": trl_head,
}


@dataclass
class Outcome:
    """Seconds of every repeat, and the last call's numbers."""

    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    gradients: tuple[Tensor, ...] = ()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    for head in HEADS.values():  # first calls pay for imports and thread pools
        call(head, problem(64, 64, 512, 0.5), Outcome(), clock)
    lines = []
    for shape in SHAPES:
        lines.append(row(shape, race(shape, options.repeats, clock)))
        print(lines[-1], flush=True)
    text = page(lines, options.repeats, options.clock)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    return 0


def race(shape: tuple[int, int, int, float], repeats: int, clock: Callable[[], float]) -> dict[str, Outcome]:
    """Every head `repeats` times in turn on one problem; equal losses and gradients are asserted."""
    given = problem(*shape)
    outcomes = {name: Outcome() for name in HEADS}
    for _ in range(repeats):
        for name, head in HEADS.items():
            call(head, given, outcomes[name], clock)
    ours = outcomes["ours"]
    for name, other in outcomes.items():
        assert abs(other.loss - ours.loss) <= 1e-5 * abs(ours.loss), (name, other.loss, ours.loss)
        for a, b in zip(other.gradients, ours.gradients, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), name
    return outcomes


def problem(tokens: int, width: int, vocabulary: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, loss weights; fp32, seeded."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * 0.02
    labels = torch.randint(vocabulary, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) >= share] = -100
    return hidden, weight, labels, torch.ones(tokens)


def call(head: Callable[..., Tensor], given: tuple[Tensor, ...], outcome: Outcome, clock: Callable[[], float]) -> None:
    """One forward and backward, timed."""
    hidden, weight, labels, loss_weights = given
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    count = int((labels != -100).sum())
    outcome.gradients = ()  # the last repeat's memory is not this one's
    start = clock()
    loss = head(hidden, weight, labels, loss_weights, num_loss_tokens=count)
    (loss / count).backward()
    outcome.seconds.append(clock() - start)
    outcome.loss = loss.item()
    assert hidden.grad is not None and weight.grad is not None
    outcome.gradients = (hidden.grad, weight.grad)


def row(shape: tuple[int, int, int, float], outcomes: dict[str, Outcome]) -> str:
    """One line of the table: milliseconds as median / minimum, ratios of medians / of minima, targets."""
    tokens, width, vocabulary, share = shape
    cells = [f"{tokens} x {width} x {vocabulary}", f"{share:.2f}"]
    cells += [f"{ms(statistics.median(o.seconds))} / {ms(min(o.seconds))}" for o in outcomes.values()]
    for peer in ("plain", "trl"):
        median, least = (f(outcomes[peer].seconds) / f(outcomes["ours"].seconds) for f in (statistics.median, min))
        cells.append(f"{median:.2f} / {least:.2f} (target {TARGETS[share][peer]:g})")
    return "| " + " | ".join(cells) + " |"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def page(lines: list[str], repeats: int, clock: str) -> str:
    """The result page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "trl", "transformers"))
    header = [
        "# Loss head on a CPU: forward + backward",
        "",
        f"`python benchmarks/head_cpu.py`, {datetime.date.today()}, {machine()}, {versions}, fp32,",
        f"{clock} time, {repeats} interleaved repeats. Milliseconds are median / minimum; ratios are peer / our time,",
        "of medians / of minima: above 1 we are faster. Losses agree to 1e-5, both gradients to 1e-4 (asserted).",
        "`trl` is the head of TRL's SFTTrainer as it runs on a CPU.",
        "",
        "| T x D x V | supervised | ours, ms | plain, ms | trl, ms | plain / ours | trl / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*header, *lines, ""])


def machine() -> str:
    """A generic description: ratios, not absolute times, are what this page is about."""
    return f"{torch.get_num_threads()} thread(s), {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    sys.exit(main())
