"""How long does planning 10^8 examples take, how long a jump to any step, and how much memory?

    python benchmarks/plan_scale.py [--examples 100000000] [--builds 5] [--seeks 200] [--folder DIR] [--out FILE]

Lengths and counts are files that are mapped (2 + 2 + 4 bytes per example, written first, so in the page cache). Every
build is a process of its own: its peak memory counts the mapped pages it touched. Peers cannot be compared: none can
jump to a step of a packed epoch.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mixes import MIXES, header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.data.packing import best_fit_compiled, count_compiled
from sft_dist.data.permutation import walk_compiled
from sft_dist.data.plan import PackPlan, build_plan

RESULT = Path(__file__).parent / "results" / "plan_scale.md"
CHUNK = 1 << 20
PACKS_PER_STEP = {"chat": 1024, "reasoning": 1024}
COLUMNS = {"lengths": np.uint16, "num_loss_tokens": np.uint16, "loss_weight_sums": np.float32}


def write_columns(folder: Path, mix: str, num: int) -> None:
    """Lengths of the mix; a third of each document supervised."""
    draw, capacity = MIXES[mix]
    files = {name: np.lib.format.open_memmap(folder / name, "w+", dtype, (num,)) for name, dtype in COLUMNS.items()}
    for seed, at in enumerate(range(0, num, CHUNK)):
        lengths = draw(min(CHUNK, num - at), capacity, seed=seed)
        files["lengths"][at : at + CHUNK] = lengths
        files["num_loss_tokens"][at : at + CHUNK] = lengths // 3 + 1
        files["loss_weight_sums"][at : at + CHUNK] = lengths // 3 + 1
    for file in files.values():
        file.flush()


def plan_of(folder: Path, mix: str, **more: Any) -> PackPlan:
    return build_plan(
        **{name: np.load(folder / name, mmap_mode="r") for name in COLUMNS},
        seq_len=MIXES[mix][1],
        packing="best_fit",
        packs_per_micro_batch=1,
        micro_batches_per_step=PACKS_PER_STEP[mix],
        examples_per_step=None,
        seed=0,
        epochs=1,
        max_steps=None,
        store_fingerprint="benchmark",
        **more,
    )


def measure(folder: Path, mix: str, num_seeks: int) -> dict[str, Any]:
    """Figures of one process."""
    start_up = seconds_of(compile_all)[0]
    build, plan = seconds_of(lambda: plan_of(folder, mix))
    after_build = peak_gib()
    steps = np.random.default_rng(0).integers(1, plan.num_steps + 1, num_seeks).tolist()
    seeks = [seconds_of(lambda step=step: plan.step(step))[0] for step in steps]
    following = [seconds_of(lambda step=step: plan.step(step))[0] for step in range(1, min(100, plan.num_steps))]
    balance, _ = seconds_of(lambda: plan.balance(64))
    digest, text = seconds_of(lambda: plan.digest)
    after_all = peak_gib()
    tables = plan.to_arrays()
    restore = seconds_of(lambda: plan_of(folder, mix, tables=tables))[0]  # maps the files a second time
    return {
        "start_up": start_up,
        "build": build,
        "seeks": seeks,
        "following": following,
        "restore": restore,
        "balance": balance,
        "digest": digest,
        "digest_text": text,
        "build_gib": after_build,
        "peak_gib": after_all,
        "num_steps": plan.num_steps,
        "num_packs": plan.num_packs,
        "efficiency": plan.efficiency,
        "table_bytes": sum(table.nbytes for table in tables.values()),
    }


def compile_all() -> None:
    """Import numba and load the three functions from its cache."""
    walk_compiled(np.arange(3, dtype=np.uint64), 300, 0)
    best_fit_compiled(np.array([1]), 8)
    count_compiled(np.array([1]), 1, 8)


def seconds_of(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def peak_gib() -> float:
    """Of this program alone: getrusage would count what the parent had mapped before it started this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def in_process(folder: Path, mix: str, seeks: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", mix, "--folder", str(folder), "--seeks", str(seeks)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(mix: str, runs: list[dict[str, Any]]) -> list[str]:
    one = runs[0]
    assert len({run["digest_text"] for run in runs}) == 1
    seeks = sorted(second for run in runs for second in run["seeks"])
    following = [second for run in runs for second in run["following"]]
    median = lambda name: statistics.median(run[name] for run in runs)  # noqa: E731
    best = lambda name: min(run[name] for run in runs)  # noqa: E731
    table = {
        "build, s (target 10)": f"{median('build'):.2f} / {best('build'):.2f}",
        "seek to a random step, ms: median, 95 %, 99 %, worst (target 30)": ", ".join(
            f"{seeks[int((len(seeks) - 1) * share)] * 1e3:.1f}" for share in (0.5, 0.95, 0.99, 1.0)
        ),
        "the step after, ms (mean)": f"{statistics.mean(following) * 1e3:.1f}",
        "memory of the build, peak GiB (target 1.2)": f"{max(run['build_gib'] for run in runs):.2f}",
        "memory with seeks and digest, peak GiB": f"{max(run['peak_gib'] for run in runs):.2f}",
        "build from a cached table, s": f"{median('restore'):.2f} / {best('restore'):.2f}",
        "digest, s": f"{median('digest'):.2f} / {best('digest'):.2f}",
        "balance for 64 ranks (estimate), s": f"{median('balance'):.2f} / {best('balance'):.2f}",
        "numba's import and cached code, s": f"{median('start_up'):.2f} / {best('start_up'):.2f}",
        "offset table, bytes": f"{one['table_bytes']:,}",
        "packs, steps": f"{one['num_packs']:,}, {one['num_steps']:,} of {PACKS_PER_STEP[mix]}",
        "slots filled": f"{one['efficiency']:.3%}",
    }
    return [f"| {mix} {MIXES[mix][1]} | {name} | {text} |" for name, text in table.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000_000)
    parser.add_argument("--builds", type=int, default=5)
    parser.add_argument("--seeks", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the files are written (8 bytes per example)")
    parser.add_argument("--measure", choices=sorted(MIXES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure, options.seeks)))
        return 0
    compile_all()
    lines: list[str] = []
    for mix in MIXES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_columns(Path(folder), mix, options.examples)
            runs = [in_process(Path(folder), mix, options.seeks) for _ in range(options.builds)]
        lines += rows(mix, runs)
        print(*lines[-12:], sep="\n", flush=True)
    page = [
        *header("Plans at scale", "python benchmarks/plan_scale.py", ("numpy", "numba")),
        f"{options.examples:,} examples, {options.builds} processes per mix, {options.seeks} random seeks in each;",
        "times are median / best.",
        "",
        "| mix, capacity | what | figure |",
        "|---|---|---|",
        *lines,
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
