"""Is everything right, and how fast is it, on this GPU? One script, under 10 minutes, ending in a short table.

    python benchmarks/gpu_check.py                 on a machine with a GPU
    python benchmarks/gpu_check.py --rehearse      every section at toy sizes on the CPU: proves that the script runs
    python benchmarks/gpu_check.py --only head     sections whose name contains the word

Sections: the loss head against float64, then against plain PyTorch, Liger and TRL; segment attention the same; the
certificate with every attention backend; one bf16 training run of a 0.5B-shaped random model. A section that breaks
prints its error in the table and the others go on. Exit code 1 if anything failed, 0 otherwise; without a GPU the
script says so and leaves with 0.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

BUDGET_SECONDS = 560
VERSIONS = ("torch", "triton", "transformers", "liger_kernel", "trl", "flash_attn")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", default="", help="run sections whose name contains this")
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        why = "this PyTorch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        print(f"gpu_check: nothing to check: {why} (torch {torch.__version__}).")
        print(
            "Run it on a machine with an NVIDIA GPU, or rehearse it here: python benchmarks/gpu_check.py --rehearse\n"
        )
        print(table([("all", "every section", "no GPU", "n/a")]))
        return 0
    from gpu_parts.bench import Place

    place = Place(torch.device("cpu" if options.rehearse else "cuda"), options.rehearse)
    print(describe(torch), flush=True)
    rows = run_sections(place, options.only)
    print("\n" + table(rows))
    failed = sum(row[3] == "FAIL" for row in rows)
    print(f"\n{failed} failed" if failed else "\nnothing failed")
    return 1 if failed else 0


def sections() -> dict[str, Callable[..., Iterator[object]]]:
    """In order of importance: what is cut by the time budget is the least."""
    from gpu_parts import attentions, certificates, heads, training

    return {
        "head right": heads.correctness,
        "attention right": attentions.correctness,
        "certificate": certificates.certificates,
        "training": training.training,
        "head speed": heads.speed,
        "attention speed": attentions.speed,
    }


def run_sections(place: object, only: str) -> list[tuple[str, str, str, str]]:
    """Rows of all sections; one that raises ends with a FAIL row of its own."""
    import torch
    from gpu_parts.bench import reason

    started, rows = time.monotonic(), []
    for name, section in sections().items():
        if only not in name:
            continue
        before = time.monotonic()
        try:
            for row in section(place):
                print(f"  [{time.monotonic() - started:5.0f} s] {row.section}: {row.what}: {row.figure}", flush=True)
                rows.append((row.section, row.what, row.figure, row.verdict))
                if time.monotonic() - started > BUDGET_SECONDS:
                    rows.append((name, "rest of the section", "cut: time budget used up", "n/a"))
                    break
        except Exception as error:  # the table is the product: the other sections still run
            rows.append((name, "the section broke", reason(error), "FAIL"))
        gc.collect()
        torch.cuda.empty_cache()
        rows.append((name, "time", f"{time.monotonic() - before:.0f} s", "info"))
    return rows


def describe(torch: object) -> str:
    """Device and versions in one line."""
    versions = []
    for name in VERSIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    cuda = torch.cuda.is_available()  # type: ignore[attr-defined]
    device = torch.cuda.get_device_name() if cuda else f"CPU rehearsal ({platform.machine()})"  # type: ignore[attr-defined]
    return f"{device}; python {platform.python_version()}, {', '.join(versions)}"


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Markdown: section, what, figure, verdict."""
    lines = ["| section | what | figure | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
