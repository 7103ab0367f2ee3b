"""How fast are lengths turned into packs, and how full are they, against what people use?

    pip install lightbinpack && pip install --no-deps --target PEERS axolotl llamafactory    # trl: the bench extra
    python benchmarks/packing.py [--samples 1000000] [--repeats 5] [--peers PEERS] [--out FILE]

Every packer gets lengths in the form it takes them fastest and gives explicit lists of documents per pack; for ours
both forms are timed, the arrays it works with and Python lists. Calls are interleaved, the garbage collector is off
during each, and every packing is verified before its time is believed. Slow packers get fewer documents: their speed
per document does not depend on how many batches there are.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mixes import MIXES, header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.data.layout import WINDOW_EXAMPLES
from sft_dist.data.packing import Packs, best_fit_compiled

RESULT = Path(__file__).parent / "results" / "packing.md"
TARGETS = {"LightBinPack": 2, "Axolotl": 10, "TRL": 100}


@dataclass
class Packer:
    """A peer: `prepare` turns lengths into its input, outside the clock; `pack` is timed; `read` gives index lists."""

    name: str
    documents: int  # at most this many
    prepare: Callable[[np.ndarray], Any]
    pack: Callable[[Any, int], Any]
    read: Callable[[Any, np.ndarray], list[list[int]]] = lambda packed, lengths: packed
    seconds: list[float] = field(default_factory=list)
    efficiency: float = 0.0


def ours(lengths: np.ndarray, capacity: int) -> list[Packs]:
    starts = range(0, len(lengths), WINDOW_EXAMPLES)
    return [best_fit_compiled(lengths[at : at + WINDOW_EXAMPLES], capacity) for at in starts]


def ours_as_lists(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    lists: list[list[int]] = []
    for number, packs in enumerate(ours(lengths, capacity)):
        members = (packs.members + number * WINDOW_EXAMPLES).tolist()
        lists += [members[start:end] for start, end in pairwise(packs.offsets.tolist())]
    return lists


def read_ours(windows: list[Packs], lengths: np.ndarray) -> list[list[int]]:
    return [(pack + number * WINDOW_EXAMPLES).tolist() for number, packs in enumerate(windows) for pack in packs]


def packers() -> tuple[list[Packer], list[str]]:
    """All packers that can be imported, and a line for each that cannot."""
    found = [
        Packer("ours, arrays", 10**9, np.asarray, ours, read_ours),
        Packer("ours, Python lists", 10**9, np.asarray, ours_as_lists),
    ]
    missing = []
    for name, add in (("LightBinPack", lightbinpack), ("Axolotl", axolotl), ("LLaMA-Factory", knapsack), ("TRL", trl)):
        try:
            found += add()
        except (ImportError, AttributeError, OSError) as error:
            missing.append(f"{name}: skipped, does not import here ({error})")
    return found, missing


def lightbinpack() -> list[Packer]:
    import lightbinpack

    return [Packer("LightBinPack obfd", 10**9, np.ndarray.tolist, lightbinpack.obfd)]


def axolotl() -> list[Packer]:
    from axolotl.utils.samplers.multipack import pack_parallel

    def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
        return pack_parallel(lengths, capacity, group_size=100_000, bin_size=200, num_processes=1)

    pack(np.array([1, 2, 3]), 8)  # compiles
    return [Packer("Axolotl pack_group, groups of 100,000", 200_000, lambda lengths: lengths.astype(np.int64), pack)]


def knapsack() -> list[Packer]:
    """LLaMA-Factory's gives lengths back, not indices; its one module is loaded without the package's dependencies."""
    package = importlib.util.find_spec("llamafactory")
    if package is None:
        raise ImportError("No module named 'llamafactory'")
    path = Path(package.submodule_search_locations[0]) / "data" / "processor" / "processor_utils.py"
    spec = importlib.util.spec_from_file_location("processor_utils", path)
    module = sys.modules["processor_utils"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def read(packs: list[list[int]], lengths: np.ndarray) -> list[list[int]]:
        ranked = np.argsort(lengths, kind="stable")
        nexts = dict(zip(*(a.tolist() for a in np.unique(lengths[ranked], return_index=True)), strict=True))
        indices = []
        for pack in packs:
            places = []
            for length in pack:
                places.append(int(ranked[nexts[length]]))
                nexts[length] += 1
            indices.append(places)
        return indices

    def pack(batches: list[list[int]], capacity: int) -> list[list[int]]:
        return module.greedy_knapsack(list(batches), capacity)

    return [Packer("LLaMA-Factory knapsack", 100_000, np.ndarray.tolist, pack, read)]


def trl() -> list[Packer]:
    """TRL packs Arrow tables of tokens; one byte per token keeps what it must move small."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    def prepare(batch: int) -> Callable[[np.ndarray], list[Any]]:
        def tables(lengths: np.ndarray) -> list[Any]:
            return [table(lengths[at : at + batch], at) for at in range(0, len(lengths), batch)]

        return tables

    def table(lengths: np.ndarray, first: int) -> Any:
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        column = pa.ListArray.from_arrays(offsets.astype(np.int32), np.zeros(offsets[-1], np.int8))
        return pa.Table.from_arrays([column], names=["input_ids"])

    def pack(tables: list[Any], capacity: int) -> list[Any]:
        return [_pack_bfd(one, capacity) for one in tables]

    def read(packed: list[Any], lengths: np.ndarray) -> list[list[int]]:
        """Its answer holds the lengths of each pack's documents."""
        numbers = (pack for one in packed for pack in one["seq_lengths"].to_pylist())
        spare: dict[int, list[int]] = {}
        for index, length in enumerate(lengths.tolist()):
            spare.setdefault(length, []).append(index)
        return [[spare[length].pop() for length in pack] for pack in numbers]

    return [
        Packer("TRL bfd, batches of 1,000 (its default)", 20_000, prepare(1000), pack, read),
        Packer("TRL bfd, one batch of 20,000", 20_000, prepare(20_000), pack, read),
    ]


def race(mix: str, samples: int, repeats: int, racers: list[Packer]) -> None:
    draw, capacity = MIXES[mix]
    for number in range(repeats):
        lengths = draw(samples, capacity, seed=number)
        for racer in racers:
            given = lengths[: racer.documents]
            prepared = racer.prepare(given)
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            packed = racer.pack(prepared, capacity)
            racer.seconds.append((time.perf_counter() - start) / len(given))
            gc.enable()
            if number == 0:
                racer.efficiency = verified(racer.read(packed, given), given, capacity)
            del packed, prepared


def verified(packs: list[list[int]], lengths: np.ndarray, capacity: int) -> float:
    """Every document once, no pack over capacity; the share of slots that are filled."""
    members = np.fromiter((index for pack in packs for index in pack), dtype=np.int64)
    assert (np.bincount(members, minlength=len(lengths)) == 1).all()
    sizes = np.fromiter((len(pack) for pack in packs), dtype=np.int64)
    fills = np.add.reduceat(lengths[members].astype(np.int64), np.cumsum(sizes) - sizes)
    assert fills.max() <= capacity
    return float(fills.mean() / capacity)


def rows(mix: str, racers: list[Packer], samples: int) -> list[str]:
    arrays, lists = racers[0], racers[1]
    lines = []
    for racer in racers:
        median, best = (pick(racer.seconds) for pick in (statistics.median, min))
        target = next((f" (target {factor})" for name, factor in TARGETS.items() if racer.name.startswith(name)), "")
        ratios = (f"{median / statistics.median(own.seconds):,.1f}" for own in (arrays, lists))
        cells = [
            f"{mix} {MIXES[mix][1]}",
            racer.name,
            f"{min(samples, racer.documents):,}",
            f"{racer.efficiency:.2%}",
            f"{1e-6 / median:.3f} / {1e-6 / best:.3f}",
            *(ratio + target for ratio in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder that peers were installed into with pip --target")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.peers:
        sys.path.append(str(options.peers.resolve()))
    best_fit_compiled(np.array([1]), 8)  # compiles, or loads what was compiled
    lines, missing = [], []
    for mix in MIXES:
        racers, missing = packers()
        race(mix, options.samples, options.repeats, racers)
        lines += rows(mix, racers, options.samples)
        print(*lines[-len(racers) :], sep="\n", flush=True)
    page = [
        *header("Packing: samples per second", "python benchmarks/packing.py", ("numpy", "numba", *installed())),
        f"{options.repeats} interleaved repeats on different draws, garbage collector off while timed; explicit packs",
        f"on all sides, verified. Ours works in windows of {WINDOW_EXAMPLES:,}. Rates are millions of documents per",
        "second, median / best; ratios compare medians, with our arrays and with our packs as Python lists (what the",
        "peers give).",
        "",
        "| mix, capacity | packer | documents | slots filled | M/s | ours (arrays) is faster by | ours (lists) by |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
        *missing,
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    return 0


def installed() -> tuple[str, ...]:
    import importlib.metadata as metadata

    names = {found.metadata["Name"].lower() for found in metadata.distributions()}
    return tuple(name for name in ("lightbinpack", "axolotl", "llamafactory", "trl", "pyarrow") if name in names)


if __name__ == "__main__":
    sys.exit(main())
