"""Are the GPUs of this node well? What the driver says of each, and how fast each multiplies matrices."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping

_FIELDS = {  # ours -> nvidia-smi's
    "index": "index",
    "name": "name",
    "memory": "memory.total",
    "max_clock": "clocks.max.sm",
    "ecc": "ecc.errors.uncorrected.volatile.total",
    "hw_slowdown": "clocks_throttle_reasons.hw_slowdown",
    "too_hot": "clocks_throttle_reasons.sw_thermal_slowdown",
}
MATRIX, PRODUCTS = 4096, 20  # of bfloat16, for the speed of a GPU


def gpus() -> list[dict[str, str]]:
    """What the driver says of each GPU; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
    return [dict(zip(_FIELDS, row, strict=True)) for row in rows if len(row) == len(_FIELDS)]


def gpu_faults(card: Mapping[str, str]) -> list[str]:
    """What the driver itself says is wrong with a GPU."""
    name, found = f"GPU {card['index']} ({card['name']})", []
    if card["ecc"].isdecimal() and int(card["ecc"]):
        found.append(f"{name}: {card['ecc']} uncorrected memory errors: reset or replace it")
    if card["hw_slowdown"] == "Active":
        found.append(f"{name}: slowed down by its hardware: look at power and cooling")
    if card["too_hot"] == "Active":
        found.append(f"{name}: slowed down because it is hot: look at cooling")
    return found


def gpu_rates() -> list[float]:
    """Teraflops of each GPU in a bfloat16 matrix product, after one to warm up; empty without one."""
    import torch

    rates = []
    for index in range(torch.cuda.device_count()):
        left = torch.ones((MATRIX, MATRIX), dtype=torch.bfloat16, device=f"cuda:{index}")
        product = left @ left
        torch.cuda.synchronize(index)
        started = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(left, left, out=product)
        torch.cuda.synchronize(index)
        rates.append(2 * MATRIX**3 * PRODUCTS / (time.perf_counter() - started) / 1e12)
    return rates
