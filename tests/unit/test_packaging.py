"""What the package declares: ranges that the pins satisfy, files that ship, pins for everything that is declared."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sft_dist import __version__
from sft_dist.config.shipped import CHECKOUT


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `setup()` in setup.py."""
    seen: dict[str, Any] = {}
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    runpy.run_path(str(CHECKOUT / "setup.py"))
    return seen


def pins() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_requirement_has_a_lower_bound_no_cap_and_a_pin_inside(metadata: dict[str, Any]) -> None:
    extras = [text for name, wanted in metadata["extras_require"].items() if name != "flash" for text in wanted]
    declared = [Requirement(text) for text in [*metadata["install_requires"], *extras]]
    pinned = pins()
    for requirement in declared:
        assert [spec.operator for spec in requirement.specifier] == [">="], requirement
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_are_exact_and_written_once() -> None:
    text = (CHECKOUT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert len(pins()) == len(lines)


def test_both_source_roots_and_the_command_are_declared(metadata: dict[str, Any]) -> None:
    assert {"sft_dist", "sft_dist.config", "sft_dist.cli", "sft_kernels"} <= set(metadata["packages"])
    assert metadata["package_dir"] == {"sft_kernels": "kernels/sft_kernels"}
    assert metadata["entry_points"]["console_scripts"] == ["sft-dist = sft_dist.cli.main:main"]
    assert metadata["version"] == __version__


def test_recipes_and_scripts_ship_under_the_names_they_are_found_by(metadata: dict[str, Any]) -> None:
    shipped = {f"{folder}/{file.rpartition('/')[2]}" for folder, files in metadata["data_files"] for file in files}
    here = {path for top in ("configs", "launch", "slurm") for path in (CHECKOUT / top).rglob("*") if path.is_file()}
    assert shipped == {f"share/sft_dist/{path.relative_to(CHECKOUT)}" for path in here}


def test_folders_that_would_shadow_other_packages_are_none() -> None:
    assert not [top for top in ("kernels", "launch", "configs") if (CHECKOUT / top / "__init__.py").exists()]
