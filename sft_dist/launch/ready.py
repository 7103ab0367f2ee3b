"""Files for those who launch by hand: `launch/accelerate/*.yaml`, `launch/deepspeed/*.json`, made from the schema.

    python -m sft_dist.launch.ready [FOLDER]     writes them anew (FOLDER: default `launch` of the checkout)

    accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes 8 -m sft_dist.train R.yaml
    sft-dist train R.yaml parallel.deepspeed_config=launch/deepspeed/zero3_params.json

Each says one strategy of `parallel:` in that tool's words and leaves the rest to the recipe, so the run is the one of
`sft-dist train R.yaml parallel.strategy=...`. Every combination that the
schema accepts and the tool can say has a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from sft_dist.config.schema import ParallelSection
from sft_dist.config.shipped import CHECKOUT

_NOTE = "# Made by `python -m sft_dist.launch.ready` from the schema; say --num_processes on the command line.\n"
_ACCELERATE: dict[str, dict[str, object]] = {  # strategy -> accelerate's words for it, beside those of every file
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": "true", "fsdp_offload_params": "false"},
    },
}
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def ready_files() -> dict[str, str]:
    """Name below `launch/` -> text."""
    return dict(sorted([*_accelerate_files(), *_deepspeed_files()]))


def _combinations() -> Iterator[tuple[str, str]]:
    """(strategy, offload) that the schema accepts."""
    fields = ParallelSection.model_fields
    for strategy in get_args(fields["strategy"].annotation):
        for offload in get_args(fields["offload"].annotation):
            try:
                ParallelSection(strategy=strategy, offload=offload)
            except ValidationError:
                continue
            yield strategy, offload


def _accelerate_files() -> Iterator[tuple[str, str]]:
    for strategy, offload in _combinations():
        if strategy in _ACCELERATE and offload == "none":
            said = {
                "compute_environment": "LOCAL_MACHINE",
                "num_machines": 1,
                "machine_rank": 0,
                "main_process_port": 0,
            }
            lines = "".join(_yaml_lines({**said, **_ACCELERATE[strategy]}))
            yield f"accelerate/{strategy}.yaml", _NOTE + lines


def _yaml_lines(values: dict[str, object], indent: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:\n"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value}\n"


def _deepspeed_files() -> Iterator[tuple[str, str]]:
    for strategy, offload in _combinations():
        if strategy not in _STAGES:
            continue
        zero: dict[str, object] = {"stage": _STAGES[strategy]}
        if offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload == "params":
            zero["offload_param"] = {"device": "cpu"}
        said = {
            "zero_optimization": zero,
            "bf16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
        suffix = "" if offload == "none" else f"_{offload}"
        yield f"deepspeed/{strategy}{suffix}.json", json.dumps(said, indent=2) + "\n"


def main() -> int:
    """Write every file; those that are no longer made are told, not deleted."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "launch"
    made = ready_files()
    for name, text in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    here = {f"{top}/{path.name}" for top in ("accelerate", "deepspeed") for path in (folder / top).glob("*")}
    for name in sorted(here - set(made)):
        print(f"{folder / name}: is not made any more: delete it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
