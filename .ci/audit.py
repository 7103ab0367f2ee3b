"""Are known holes closed? Compares what is installed, pinned and allowed with the advisories of `.ci/advisories.json`.

Works without a network: the table is part of the project, with the day it was last compared with the public ones. Fails
where an installed package or a pin of constraints.txt is older than a fix, and where setup.py allows an older version
of torch, transformers or jinja2, whose holes let a file run code. Warns when the table has not been looked at for long.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

HERE = Path(__file__).parent
FLOORS = {"torch": "2.10.0", "transformers": "5.0.0rc3", "jinja2": "3.1.6"}
LOOK_AGAIN_DAYS = 180


def installed(package: str) -> str | None:
    """Its version here; None when it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    """Package -> version of each `name==version` line."""
    return {name.lower(): pinned for name, pinned in re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE)}


def requirements(text: str) -> Iterator[Requirement]:
    """Those that are written as text in setup.py."""
    for quoted in re.findall(r'"([A-Za-z][\w.-]*(?:\[[\w,]+\])?[<>=!~][^"]*)"', text):
        yield Requirement(quoted)


def faults(advisories: list[dict[str, str]], pinned: dict[str, str], allowed: list[Requirement]) -> Iterator[str]:
    """One line for each hole that is open."""
    for advisory in advisories:
        name, fixed = advisory["package"], Version(advisory["fixed"])
        for where, found in (("installed", installed(name)), ("constraints.txt", pinned.get(name))):
            if found is not None and Version(found) < fixed:
                yield f"{name} {found} ({where}): {advisory['id']}: {advisory['what']}; fixed in {fixed}"
    for name, floor in FLOORS.items():
        for requirement in allowed:
            lower = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", ">", "~=")]
            if requirement.name.lower() == name and max(lower, default=Version("0")) < Version(floor):
                yield f"setup.py: {requirement} allows versions before {floor}, which have known holes"


def main() -> int:
    table = json.loads((HERE / "advisories.json").read_text())
    found = list(
        faults(
            table["advisories"],
            pins((HERE.parent / "constraints.txt").read_text()),
            list(requirements((HERE.parent / "setup.py").read_text())),
        )
    )
    age = (date.today() - date.fromisoformat(table["checked"])).days
    if age > LOOK_AGAIN_DAYS:
        print(
            f"audit: warning: .ci/advisories.json was last compared {age} days ago: look for new ones", file=sys.stderr
        )
    for line in found:
        print(f"audit: {line}", file=sys.stderr)
    if not found:
        print(f"audit: {len(table['advisories'])} advisories of {table['checked']}, none of them open")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
