"""What the bits of a step depend on beside recipe and data: libraries, Python, the device, threads and kernels.

Each checkpoint's manifest keeps it as `versions`. Nothing of it is refused at a resume: a run must survive an update of
its machine, and moving it is allowed. But nobody should look for a changed bit in the wrong place, so it is told.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from sft_dist.parts import Parts

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "numpy", "safetensors", "sft_dist")
ABSENT = "not installed"


def surroundings(parts: Parts) -> dict[str, str]:
    """Name -> value, of this rank."""
    device = parts.place.device
    kernels = {f"{part} kernel": told.partition(" (")[0] for part, told in parts.kernels}  # without the reason
    return {
        **{name: installed(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": str(parts.place.num_threads),
        **kernels,
    }


def installed(name: str) -> str:
    """The version of a library here."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def warning_of_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """One line that names what is no longer as it was `before`; None if all is. What an older version of this program
    has not recorded is not compared."""
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if not changed:
        return None
    return f"warning: not as when this checkpoint was written: {', '.join(changed)}; bits may differ from here on"
