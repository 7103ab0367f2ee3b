"""`sft-dist quickstart` from nothing, cut short: all of its stations, none of its learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sft_dist.observe.run_files import read_lines

pytestmark = pytest.mark.slow

SHORT = ("--examples", "300", "optim.max_steps=4", "eval.exact_match=36", "eval.generate=2", "run.seed=3")


def test_quickstart_trains_packed_on_two_processes_and_compares(
    run_cli: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_cli("quickstart", *SHORT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/quickstart"

    assert "2 process(es) on cpu" in done.stdout
    assert "packing best_fit" in done.stdout
    assert (run_dir / "report.html").stat().st_size > 0

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["exact_match_before"] == 0.0

    checked = read_lines(run_dir / "exact_match.jsonl")
    assert sorted(record["phase"] for record in checked) == ["after"] * 36 + ["before"] * 36
    assert {record["id"].rpartition(":")[0] for record in checked} == {"runs/quickstart-data/test.jsonl"}

    for shown in ("exact match on held-out inputs", "instruction", "expected", "base", "tuned", "report.html"):
        assert shown in done.stdout
