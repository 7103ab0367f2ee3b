"""How long do ranks wait for each other? Simulated: mean cost over the slowest rank's, for three ways to deal packs.

    python benchmarks/balance.py [--examples 2000000] [--repeats 5] [--out FILE]

The packs and steps are the plan's; only who gets which pack differs. `random` deals a step's packs in shuffled order.
`levelled` gives the longest pack left to the rank with the least so far (at most M packs each), as balancers of
per-rank sums do, and runs them in shuffled order. `cost-sorted` is the plan's: packs of like cost meet in one
micro-step. Two clocks: sharded training (FSDP, ZeRO-3) waits at every micro-step, replicated training once per step.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mixes import MIXES, header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.data.plan import PackPlan, build_plan

RESULT = Path(__file__).parent / "results" / "balance.md"
RANKS = (8, 64, 1024)
MICRO_STEPS = (4, 16)
MAX_STEPS = 40  # simulated per plan
TARGET = 0.91  # reasoning mix, 4 micro-steps


def plan_of(mix: str, num_examples: int, packs_per_step: int, seed: int) -> PackPlan:
    draw, capacity = MIXES[mix]
    lengths = draw(num_examples, capacity, seed=seed)
    return build_plan(
        lengths=lengths,
        num_loss_tokens=lengths,
        loss_weight_sums=lengths,
        seq_len=capacity,
        packing="best_fit",
        packs_per_micro_batch=1,
        micro_batches_per_step=packs_per_step,
        examples_per_step=None,
        seed=seed,
        epochs=1,
        max_steps=None,
        store_fingerprint="benchmark",
    )


def dealt_randomly(costs: np.ndarray, ranks: int, random: np.random.Generator) -> np.ndarray:
    """Cost of each pack by [micro-step, rank]."""
    return random.permutation(costs).reshape(-1, ranks)


def levelled(costs: np.ndarray, ranks: int, random: np.random.Generator) -> np.ndarray:
    """Longest first to the least loaded rank that has room; each rank then runs its packs in random order."""
    micro_steps = len(costs) // ranks
    load = [(0.0, rank) for rank in range(ranks)]
    packs: list[list[float]] = [[] for _ in range(ranks)]
    for cost in costs.tolist():
        total, rank = heapq.heappop(load)
        packs[rank].append(cost)
        if len(packs[rank]) < micro_steps:
            heapq.heappush(load, (total + cost, rank))
    return random.permuted(np.array(packs), axis=1).T


def cost_sorted(costs: np.ndarray, ranks: int, random: np.random.Generator) -> np.ndarray:
    """As the plan has them: falling cost, rank r takes element r of each group."""
    return costs.reshape(-1, ranks)


DEALERS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "random": dealt_randomly,
    "levelled": levelled,
    "cost-sorted (ours)": cost_sorted,
}


def simulate(mix: str, num_examples: int, ranks: int, micro_steps: int, seed: int) -> dict[str, tuple[float, float]]:
    """Dealer -> utilisation when every micro-step waits, and when every step does. Only full steps count."""
    plan = plan_of(mix, num_examples, ranks * micro_steps, seed)
    random = np.random.default_rng(seed)
    full = range(1, min(plan.steps_per_epoch, MAX_STEPS + 1))
    steps = [np.array([pack.cost for pack in plan.step(number).packs]) for number in full]
    assert steps, "too few examples for one step"
    shares = {}
    for name, dealer in DEALERS.items():
        dealt = [dealer(costs, ranks, random) for costs in steps]
        work = sum(costs.mean(axis=1).sum() for costs in dealt)
        each_micro_step = sum(costs.max(axis=1).sum() for costs in dealt)
        each_step = sum(costs.sum(axis=0).max() for costs in dealt)
        shares[name] = (work / each_micro_step, work / each_step)
    return shares


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5, help="seeds")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    lines = []
    for mix in MIXES:
        for micro_steps in MICRO_STEPS:
            for ranks in RANKS:
                runs = [simulate(mix, options.examples, ranks, micro_steps, seed) for seed in range(options.repeats)]
                cells = [f"{mix} {MIXES[mix][1]}", f"{ranks}", f"{micro_steps}"]
                for clock in range(2):
                    cells += [f"{statistics.median(run[name][clock] for run in runs):.3f}" for name in DEALERS]
                if mix == "reasoning" and micro_steps == 4:
                    cells[5] += f" (target {TARGET})"
                lines.append("| " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
    names = " | ".join(DEALERS)
    page = [
        *header("Balance: simulated utilisation", "python benchmarks/balance.py", ("numpy", "numba")),
        f"Medians over {options.repeats} seeds, {options.examples:,} documents each, up to {MAX_STEPS} full steps; a",
        "pack costs tokens + squared lengths / 24,576. The first three figures are for waiting at every micro-step,",
        "the last three for waiting once per step.",
        "",
        f"| mix, capacity | ranks | micro-steps | {names} | {names} |",
        "|---|---|---|" + "---|" * (2 * len(DEALERS)),
        *lines,
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
