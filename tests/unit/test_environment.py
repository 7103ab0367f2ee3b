"""Launchers' settings are adopted, refused with the difference, or told; never ignored.

The environments are those that accelerate 1.15 and deepspeed 0.19 were seen to set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.environment import check_launcher, check_world
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
STARTED_TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {"run": {"name": "r"}, "model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, **sections}
    )


def command(words: str) -> list[list[str]]:
    return [["/venv/bin/python3", "/venv/bin/accelerate", "launch", *words.split(), "-m", "sft_dist.train", "R.yaml"]]


def test_torchrun_and_deepspeed_ask_for_nothing() -> None:
    for environ in (STARTED_TWO, STARTED_TWO | {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, {}):
        assert check_launcher(recipe(), dict(environ)) == (recipe(), [])


def test_plain_accelerate_leaves_the_recipe_and_tells_about_its_precision() -> None:
    plain = ACCELERATE | STARTED_TWO
    assert check_launcher(recipe(precision={"compute": "float32"}), dict(plain)) == (
        recipe(precision={"compute": "float32"}),
        [],
    )
    same, notices = check_launcher(recipe(), dict(plain), command("--multi_gpu --num_processes 2"))
    assert same == recipe()
    assert notices == ["accelerate was given no --mixed_precision: precision.compute=auto holds"]


@pytest.mark.parametrize("flag", ["--mixed_precision no", "--mixed-precision=no"])
def test_a_precision_written_on_its_command_line_is_adopted(flag: str) -> None:
    adopted, notices = check_launcher(recipe(), ACCELERATE | STARTED_TWO, command(f"--num_processes 2 {flag}"))
    assert adopted.precision.compute == "float32"
    assert notices == ["precision.compute=float32 taken from ACCELERATE_MIXED_PRECISION=no"]


def test_bf16_is_adopted_and_told_unless_it_is_the_recipes_own() -> None:
    environ = ACCELERATE | STARTED_TWO | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    adopted, notices = check_launcher(recipe(), dict(environ))
    assert adopted.precision.compute == "bfloat16"
    assert notices == ["precision.compute=bfloat16 taken from ACCELERATE_MIXED_PRECISION=bf16"]
    own = recipe(precision={"compute": "bfloat16"})
    assert check_launcher(own, dict(environ)) == (own, [])


def test_a_contradiction_is_refused_with_both_sides() -> None:
    environ = ACCELERATE | STARTED_TWO | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    with pytest.raises(ConfigError) as error:
        check_launcher(recipe(precision={"compute": "float32"}), environ)
    assert str(error.value) == (
        "ACCELERATE_MIXED_PRECISION=bf16 means precision.compute=bfloat16, but the recipe says "
        "precision.compute=float32: change the launcher's setting or the recipe"
    )


def test_fsdp_is_adopted_with_its_checkpointing() -> None:
    environ = ACCELERATE | STARTED_TWO | FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    adopted, notices = check_launcher(recipe(precision={"compute": "float32"}), environ)
    assert adopted.parallel.strategy == "fsdp2"
    assert adopted.memory.activation_checkpointing == "full"
    assert [notice.split(" taken")[0] for notice in notices] == [
        "parallel.strategy=fsdp2",
        "memory.activation_checkpointing=full",
    ]


ZERO = {  # accelerate launch --use_deepspeed --zero_stage 3 --offload_optimizer_device cpu --offload_param_device cpu
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,offload_optimizer_device",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}


def test_deepspeed_stage_and_offloading_are_adopted() -> None:
    own = {"precision": {"compute": "float32"}}
    adopted, notices = check_launcher(recipe(**own), ACCELERATE | STARTED_TWO | ZERO)
    assert (adopted.parallel.strategy, adopted.parallel.offload) == ("zero3", "params")
    assert [notice for notice in notices if "no effect" not in notice] == [
        "parallel.strategy=zero3 taken from ACCELERATE_DEEPSPEED_ZERO_STAGE=3",
        "parallel.offload=params taken from ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=cpu",
    ]
    assert sum("no effect" in notice for notice in notices) == 3  # the rest of ZERO, each by name
    with pytest.raises(ConfigError, match=r"means parallel\.strategy=zero3, but the recipe says .*fsdp2"):
        check_launcher(recipe(parallel={"strategy": "fsdp2"}), ACCELERATE | STARTED_TWO | ZERO)


def test_deepspeeds_own_file_is_adopted_through_accelerate(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}')
    environ = ACCELERATE | STARTED_TWO | {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }  # fmt: skip
    adopted, notices = check_launcher(recipe(precision={"compute": "float32"}), dict(environ))
    assert (adopted.parallel.strategy, adopted.optim.max_grad_norm) == ("zero2", 0.5)
    assert notices[0].startswith("parallel.deepspeed_config=")
    file.write_text('{"zero_optimization": {"stage": 2, "stage4": 1}}')
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage4: unknown here"):
        check_launcher(recipe(), dict(environ))


def test_fsdp_against_a_ddp_recipe_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"means parallel\.strategy=fsdp2, but the recipe says parallel\.strategy=ddp"
    ):
        check_launcher(recipe(parallel={"strategy": "ddp"}), ACCELERATE | STARTED_TWO | FSDP)


@pytest.mark.parametrize(
    "extra",
    [
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
        FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
        FSDP | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
        FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    ],
    ids=lambda extra: " ".join(f"{k}={v}" for k, v in extra.items() if k not in FSDP or FSDP[k] != v),
)
def test_what_cannot_be_had_is_refused_naming_the_variable(extra: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_launcher(recipe(), ACCELERATE | STARTED_TWO | extra)
    assert any(str(error.value).startswith(f"{name}={value}: ") for name, value in extra.items())


def test_clipping_is_adopted_or_refused() -> None:
    environ = ACCELERATE | STARTED_TWO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    adopted, _ = check_launcher(recipe(), dict(environ))
    assert adopted.optim.max_grad_norm == 0.5
    with pytest.raises(ConfigError, match=r"optim\.max_grad_norm=0\.5, but the recipe says optim\.max_grad_norm=1\.0"):
        check_launcher(recipe(optim={"max_grad_norm": 1.0}), environ)


def test_what_has_no_effect_is_told() -> None:
    _, notices = check_launcher(recipe(), STARTED_TWO | {"ACCELERATE_DEBUG_MODE": "true"})
    assert notices == ["ACCELERATE_DEBUG_MODE=true has no effect here"]


def test_use_cpu_hides_the_gpus() -> None:
    environ = ACCELERATE | {"ACCELERATE_USE_CPU": "True", "CUDA_VISIBLE_DEVICES": "0,1"}
    check_launcher(recipe(), environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


ONE_OF_TWO = ACCELERATE | {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


BY_MODULE = [
    "python3",
    "-m",
    "accelerate.commands.launch",
    "--cpu",
    "--num_processes",
    "2",
    "-m",
    "sft_dist.train",
    "R",
]


@pytest.mark.parametrize(
    "launchers", [command("--cpu --num_processes 2"), command("--cpu --num-processes=2"), [BY_MODULE]]
)
def test_accelerate_told_two_that_started_one_is_refused(launchers: list[list[str]]) -> None:
    with pytest.raises(ConfigError) as error:
        check_world(ONE_OF_TWO, launchers)
    assert str(error.value) == (
        "accelerate launch was told to start 2 processes and started 1 (without --multi_gpu it runs the script once): "
        "use accelerate launch --multi_gpu --num_processes 2 -m sft_dist.train ..., or sft-dist train ... --nproc 2"
    )


def test_it_is_refused_too_where_only_a_config_file_says_two() -> None:
    with pytest.raises(ConfigError, match="told to start N processes and started 1"):
        check_world(ONE_OF_TWO, command("--config_file two.yaml"))


def test_counts_that_agree_pass() -> None:
    check_world(ACCELERATE | STARTED_TWO, command("--multi_gpu --num_processes 2"))
    check_world(ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, command("--cpu --num_processes 1"))
    check_world({"MASTER_ADDR": "somewhere"}, [])


def test_the_scripts_own_words_are_not_accelerates() -> None:
    argv = [*command("")[0], "--num_processes", "7"]
    check_world(ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, [argv])


def test_mpirun_without_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE=4 but RANK is not set"):
        check_world({"OMPI_COMM_WORLD_SIZE": "4"})


def test_sequence_parallel_is_adopted_or_contradicted() -> None:
    asked = ACCELERATE | STARTED_TWO | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
    adopted, told = check_launcher(recipe(), dict(asked))
    assert adopted.parallel.sequence == 2
    assert "parallel.sequence=2 taken from PARALLELISM_CONFIG_SP_SIZE=2" in told
    assert not any("no effect" in line for line in told)
    with pytest.raises(ConfigError, match=r"means parallel\.sequence=2, but the recipe says parallel\.sequence=1"):
        check_launcher(recipe(parallel={"sequence": 1}), dict(asked))


def asking_for(replicas: int, shards: int, ranks: int) -> dict[str, str]:
    """What accelerate sets for such a mesh."""
    mesh = {"DP_REPLICATE": replicas, "DP_SHARD": shards}
    sizes = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in mesh.items()}
    started = {"WORLD_SIZE": str(ranks), "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    return ACCELERATE | STARTED_TWO | sizes | started


@pytest.mark.parametrize(
    ("mesh", "taken", "names"),
    [
        ((2, 2), {"dp_replicate": 2, "strategy": "fsdp2"}, ["DP_REPLICATE", "DP_SHARD"]),
        ((2, 1), {"strategy": "ddp"}, ["DP_REPLICATE"]),
        ((1, 2), {"strategy": "fsdp2"}, ["DP_SHARD"]),
    ],
    ids=["replicas of shards", "plain replicas", "shards"],
)
def test_the_mesh_is_adopted(mesh: tuple[int, int], taken: dict[str, Any], names: list[str]) -> None:
    adopted, told = check_launcher(recipe(precision={"compute": "float32"}), asking_for(*mesh, ranks=mesh[0] * mesh[1]))
    assert {key: getattr(adopted.parallel, key) for key in taken} == taken
    sources = [f"PARALLELISM_CONFIG_{name}_SIZE=2" for name in names]
    assert told == [
        f"parallel.{key}={value} taken from {s}" for (key, value), s in zip(taken.items(), sources, strict=True)
    ]


def test_a_mesh_of_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DP_SHARD_SIZE=4: a mesh of 8 processes, and 4 were started"):
        check_launcher(recipe(), asking_for(2, 4, ranks=4))


def test_compiled_layers_and_offloaded_activations_are_adopted() -> None:
    asked = ACCELERATE | STARTED_TWO | FSDP | {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
    }  # fmt: skip
    adopted, told = check_launcher(recipe(precision={"compute": "float32"}), asked)
    assert adopted.precision.compile and adopted.memory.activation_offload
    assert "precision.compile=True taken from ACCELERATE_DYNAMO_BACKEND=INDUCTOR" in told
    assert "memory.activation_offload=True taken from FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true" in told
