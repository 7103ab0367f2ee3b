"""`accelerate launch --config_file`: files as `accelerate config` writes them, through accelerate's own code.

What it would put into a worker's environment is what our side reads, so a variable that it renames is noticed here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from sft_dist.config.environment import check_launcher
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

COMMON = {"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, "num_machines": 1, "num_processes": 2}
DEEPSPEED = COMMON | {
    "distributed_type": "DEEPSPEED", "mixed_precision": "bf16",
    "deepspeed_config": {
        "zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu", "zero3_init_flag": True,
        "zero3_save_16bit_model": True, "gradient_accumulation_steps": 1, "gradient_clipping": 0.7,
    },
}  # fmt: skip
FSDP = COMMON | {
    "distributed_type": "FSDP", "mixed_precision": "bf16",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": True, "fsdp_cpu_ram_efficient_loading": True,
    },
}  # fmt: skip


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, **sections})


def environment(tmp_path: Path, config: dict[str, Any]) -> dict[str, str]:
    """What accelerate would add for a worker started with this file."""
    path = tmp_path / "accelerate.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    arguments = ["--config_file", str(path), "-m", "sft_dist.train", "R.yaml"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    is_deepspeed = config["distributed_type"] == "DEEPSPEED"
    if is_deepspeed:  # its `launch_command` sets this between the two calls
        parsed.deepspeed_fields_from_accelerate_config = ",".join(config["deepspeed_config"])
    made = prepare_deepspeed_cmd_env(parsed)[1] if is_deepspeed else prepare_multi_gpu_env(parsed)
    added = {name: value for name, value in made.items() if os.environ.get(name) != value}
    return added | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_a_deepspeed_file_of_accelerate_is_obeyed(tmp_path: Path) -> None:
    found, notices = check_launcher(recipe(), environment(tmp_path, DEEPSPEED))
    assert (found.parallel.strategy, found.parallel.offload) == ("zero3", "params")
    assert found.precision.compute == "bfloat16" and found.optim.max_grad_norm == 0.7
    assert sum("taken from" in line for line in notices) == 4
    assert any("ZERO3_INIT" in line and "no effect here" in line for line in notices)


def test_a_json_file_inside_the_file_is_obeyed(tmp_path: Path) -> None:
    inner = tmp_path / "ds.json"
    inner.write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}))
    config = DEEPSPEED | {"deepspeed_config": {"deepspeed_config_file": str(inner), "zero3_init_flag": False}}
    config.pop("mixed_precision")  # accelerate wants to hear it once
    found, _ = check_launcher(recipe(), environment(tmp_path, config))
    assert (found.parallel.strategy, found.precision.compute) == ("zero1", "bfloat16")
    with pytest.raises(
        ConfigError, match=r"means parallel\.strategy=zero1, but the recipe says parallel\.strategy=fsdp2"
    ):
        check_launcher(recipe(parallel={"strategy": "fsdp2"}), environment(tmp_path, config))


def test_an_fsdp_file_is_obeyed(tmp_path: Path) -> None:
    found, _ = check_launcher(recipe(), environment(tmp_path, FSDP))
    assert found.parallel.strategy == "fsdp2" and found.memory.activation_checkpointing == "full"
    assert found.precision.compute == "bfloat16"
    wrong = FSDP | {"fsdp_config": FSDP["fsdp_config"] | {"fsdp_offload_params": True}}
    with pytest.raises(ConfigError, match=r"FSDP_OFFLOAD_PARAMS=true: use parallel\.strategy=zero3"):
        check_launcher(recipe(), environment(tmp_path, wrong))
