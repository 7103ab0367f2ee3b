"""What does a rank do for one step when there are many ranks?

    python benchmarks/loader_scale.py [--repeats 5] [--out FILE]

Each rank has one pack of 8,192 tokens a step. Rank 0 verifies and hashes the whole global batch, because it writes
metrics.jsonl; the others verify what they train. All of it happens in the loader's thread, a step ahead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mixes import chat_lengths, header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.data.loader import Loader
from sft_dist.data.plan import PackPlan, build_plan
from sft_dist.data.store import TokenStore, open_store, write_store
from sft_dist.types import TokenizedExample

RESULT = Path(__file__).parent / "results" / "loader_scale.md"
SEQ_LEN, NUM_EXAMPLES = 8192, 40_000
WORLDS = (1, 8, 64, 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sft-loader-") as folder:
        write_store(f"{folder}/store", examples(), {})
        store = open_store(f"{folder}/store")
        rows = [row for world_size in WORLDS for row in measure(store, world_size, options.repeats)]
    title = header("What a rank loads for one step", "python benchmarks/loader_scale.py", ("numpy", "torch"))
    about = (
        f"One pack of {SEQ_LEN:,} tokens a rank and step; median of {options.repeats} steps, read from the page cache."
    )
    table = ["| ranks | tokens of a step | rank | plan, ms | plan and batch, ms |", "|---|---|---|---|---|", *rows]
    text = "\n".join([*title, about, "", *table, ""])
    print(text)
    options.out.write_text(text)
    return 0


def examples() -> list[TokenizedExample]:
    draw = np.random.default_rng(0)
    lengths = np.maximum(chat_lengths(NUM_EXAMPLES, SEQ_LEN), 4)
    return [
        TokenizedExample(
            draw.integers(0, 50_000, length).astype(np.int32),
            (np.arange(length) > length // 2).astype(np.float32),
            "file",
            f"file:{number}",
        )
        for number, length in enumerate(lengths)
    ]


def measure(store: TokenStore, world_size: int, repeats: int) -> list[str]:
    plan = plan_of(store, world_size)
    plan.step(1)
    roles = {0: "0: reads all", world_size - 1: "any other: reads its own"} if world_size > 1 else {0: "0"}
    return [_row(store, plan, rank, world_size, name, repeats) for rank, name in roles.items()]


def _row(store: TokenStore, plan: PackPlan, rank: int, world_size: int, name: str, repeats: int) -> str:
    steps = [1 + number % plan.num_steps for number in range(repeats)]
    with Loader(
        store,
        plan,
        rank=rank,
        world_size=world_size,
        packing="best_fit",
        pad_token_id=0,
        pad_to_multiple_of=64,
        reads_all=rank == 0,
    ) as loader:
        planned = [_milliseconds(lambda step=step: plan.step(step)) for step in steps]
        built = [_milliseconds(lambda step=step: loader.build(step)) for step in steps]
    tokens = plan.step(1).num_tokens
    return (
        f"| {world_size:,} | {tokens:,} | {name} | {statistics.median(planned):.1f} | {statistics.median(built):.1f} |"
    )


def plan_of(store: TokenStore, world_size: int) -> PackPlan:
    return build_plan(
        lengths=store.lengths,
        num_loss_tokens=store.num_loss_tokens,
        loss_weight_sums=store.loss_weight_sums,
        seq_len=SEQ_LEN,
        packing="best_fit",
        packs_per_micro_batch=1,
        micro_batches_per_step=world_size,
        examples_per_step=None,
        seed=0,
        epochs=1,
        max_steps=None,
        store_fingerprint=store.fingerprint,
    )


def _milliseconds(function) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
