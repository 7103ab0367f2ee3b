"""What works with what: the combinations of recipe values, which of them are refused, and the page that tells.

    python tests/distributed/compatibility_table.py        writes docs/compatibility.md

A combination is refused when the recipe says so, before anything is loaded; every other one is in `cases()`, which
`test_compatibility_table.py` runs for one step on tiny weights and two processes. So the page cannot promise what no
test has done.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft_dist.config.schema import (
    DataSection,
    MemorySection,
    OptimSection,
    ParallelSection,
    PrecisionSection,
    Recipe,
    TuningSection,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
Case = tuple[tuple[str, Any], ...]  # (dotted key, value), the keys in order


def words(section: type, name: str) -> tuple[Any, ...]:
    """The values that the schema allows, without `auto`."""
    return tuple(value for value in typing.get_args(section.model_fields[name].annotation) if value != "auto")  # type: ignore[attr-defined]


METHODS = words(TuningSection, "method")
PACKINGS = words(DataSection, "packing")
STRATEGIES = words(ParallelSection, "strategy")
ADAPTERS = ("full", "lora", "qlora", "prefix")


@dataclass(frozen=True)
class Table:
    """Rows against columns; `exports`: each cell is exported too, and the export certified."""

    title: str
    row: tuple[str, tuple[Any, ...]]
    column: tuple[str, tuple[Any, ...]]
    exports: bool = False

    def cell(self, row: Any, column: Any) -> Case:
        return tuple(sorted({self.row[0]: row, self.column[0]: column}.items()))


TABLES = (
    Table("Tuning methods and engines", ("tuning.method", METHODS), ("parallel.strategy", STRATEGIES), exports=True),
    Table("Offloading and engines", ("parallel.offload", ("optimizer", "params")), ("parallel.strategy", STRATEGIES)),
    Table("Optimizers and engines", ("optim.name", words(OptimSection, "name")), ("parallel.strategy", STRATEGIES)),
    Table("Reproducibility and engines", ("run.deterministic", (True, "elastic")), ("parallel.strategy", STRATEGIES)),
    Table("Sequence parallel and engines", ("parallel.sequence", (2,)), ("parallel.strategy", STRATEGIES), True),
    Table("Sequence parallel and tuning methods", ("parallel.sequence", (2,)), ("tuning.method", ADAPTERS)),
    Table("Packing and tuning methods", ("data.packing", PACKINGS), ("tuning.method", ADAPTERS)),
    Table("Packing and sequence parallel", ("data.packing", PACKINGS), ("parallel.sequence", (1, 2))),
    Table("Compute dtype and engines", ("precision.compute", words(PrecisionSection, "compute")),
          ("parallel.strategy", STRATEGIES)),
    Table("Activation checkpointing and engines",
          ("memory.activation_checkpointing", words(MemorySection, "activation_checkpointing")),
          ("parallel.strategy", STRATEGIES)),
    Table("Activation offloading and engines", ("memory.activation_offload", (True,)),
          ("parallel.strategy", STRATEGIES)),
)  # fmt: skip


def overrides(case: Case) -> dict[str, dict[str, Any]]:
    """Section -> key -> value."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in case:
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def refusal(case: Case) -> str | None:
    """Why a recipe with these values is refused, None when it is not."""
    base: dict[str, Any] = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}}
    for section, values in overrides(case).items():
        base[section] = base.get(section, {}) | values
    try:
        Recipe.model_validate(base)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return None


def cells() -> Iterator[tuple[Table, Case]]:
    for table in TABLES:
        for row in table.row[1]:
            for column in table.column[1]:
                yield table, table.cell(row, column)


def cases() -> dict[Case, bool]:
    """Every combination that is not refused -> whether it is exported."""
    found: dict[Case, bool] = {}
    for table, case in cells():
        if refusal(case) is None:
            found[case] = found.get(case, False) or table.exports
    return found


def name(case: Case) -> str:
    return " ".join(f"{key}={value}" for key, value in case)


def page() -> str:
    """docs/compatibility.md."""
    notes: dict[str, int] = {}
    lines = [
        "# What works with what",
        "",
        "Written by `python tests/distributed/compatibility_table.py`; a test asserts that it is current. Every `yes`",
        "is one optimizer step of the real parts (data, certificate, engine, optimizer) on tiny weights and two gloo",
        "processes, in `tests/distributed/test_compatibility_table.py`; in tables marked with * the model is then",
        "exported and the export certified. A number is a refusal, before anything is loaded, with the reason below.",
        "What the schema has no word for (tensor, pipeline and expert parallelism) is not built: shard with fsdp2 or",
        "zero3, cut long rows with `parallel.sequence`.",
        "HSDP (`parallel.dp_replicate`) needs four processes and is tested with the engines.",
        "",
    ]
    for table in TABLES:
        lines += [f"## {table.title}{' *' if table.exports else ''}", ""]
        lines += [_line([f"{table.row[0]} \\ {table.column[0]}", *map(str, table.column[1])])]
        lines += [_line(["---"] * (1 + len(table.column[1])))]
        lines += [
            _line([f"`{row}`", *(_mark(table.cell(row, column), notes) for column in table.column[1])])
            for row in table.row[1]
        ]
        lines += [""]
    lines += ["## Refusals", "", *(f"{number}. {reason}" for reason, number in notes.items()), ""]
    return "\n".join(lines)


def _mark(case: Case, notes: dict[str, int]) -> str:
    reason = refusal(case)
    if reason is None:
        return "yes"
    asked, separator, why = reason.partition(": ")
    note = why if separator and " with " in asked else reason  # rows of values share one reason
    return str(notes.setdefault(note, len(notes) + 1))


def _line(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"


def run_recipe(template: Mapping[str, Any], case: Case, run_dir: Path) -> Recipe:
    """The recipe of one case: `template` with the values laid over it."""
    tree = {section: dict(values) for section, values in template.items()}
    for section, values in overrides(case).items():
        tree[section] = tree.get(section, {}) | values
    tree["run"] = tree["run"] | {"dir": str(run_dir)}
    return Recipe.model_validate(tree)


if __name__ == "__main__":
    PAGE.write_text(page())
