"""One rank: one step of a run's real parts for each case, exported where the table says so.

`python compatibility_worker.py FOLDER RECIPE.json NUMBER OF` does every OF-th case from NUMBER on and writes
FOLDER/found-NUMBER.json: name of the case -> loss and what the export's certificate says, or the error.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from compatibility_table import Case, cases, name, run_recipe

from sft_dist import milestones
from sft_dist.errors import SftError
from sft_dist.inputs import read_inputs
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.parts import build_parts
from sft_dist.resilience.ending import run_and_end
from sft_dist.train import train_step


def one_step(case: Case, template: dict[str, Any], run_dir: Path, exports: bool, place: Runtime) -> dict[str, Any]:
    recipe = run_recipe(template, case, run_dir)
    parts = build_parts(read_inputs(recipe, lambda text: None), place, run_dir)
    try:
        loaded = parts.train.loader.step(1)
        result = train_step(parts.engine, loaded, lr=1e-3, max_norm=1.0, seed=0, device=place.device, stop=False)
        certificate = milestones.export(parts, run_dir) if exports else None
    finally:
        parts.close()
    return {"loss": result.loss, "export": None if certificate is None else certificate.line()}


def main(folder: Path, template: dict[str, Any], number: int, of: int) -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    with runtime() as place:
        torch.set_num_threads(1)
        for index, (case, exports) in list(enumerate(cases().items()))[number::of]:
            run_dir = folder / f"case-{index}"
            try:
                found[name(case)] = one_step(case, template, run_dir, exports, place)
            except SftError as error:  # the same on all ranks; anything else is a bug and ends the worker
                found[name(case)] = {"error": f"{type(error).__name__}: {error}"}
        if place.is_main:
            (folder / f"found-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(
        lambda: main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]), int(sys.argv[4]))
    )
