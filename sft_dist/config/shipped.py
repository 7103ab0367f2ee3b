"""Where the files lie that ship with the project: recipes (`configs/`), scripts (`launch/`, `slurm/`)."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(sys.prefix) / "share" / "sft_dist"


def find_shipped(name: str | Path) -> Path:
    """`name` itself if it exists, else the shipped file of that name: in the checkout, then the installed one.

    A name that is nowhere is returned unchanged, for the caller's own error.
    """
    given = Path(name)
    if given.is_absolute() or given.exists():
        return given
    return next((root / given for root in (CHECKOUT, INSTALLED) if (root / given).is_file()), given)
