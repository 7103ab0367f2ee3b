"""What `accelerate launch` and `deepspeed` put in the environment: adopted, or refused with the difference shown.

accelerate hands its flags and its config file to workers as ACCELERATE_* and FSDP_* variables and expects the script
to obey them. A setting that the recipe leaves at its default is taken over; one that contradicts the recipe, or that
this trainer cannot do, is a ConfigError; one that changes nothing here is told. Nothing is ignored in silence.

It also finds the launcher that was told to start N processes and started one: `accelerate launch --cpu
--num_processes 2` runs the script once and mentions the 2 nowhere (accelerate 1.15, `simple_launcher`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from sft_dist.config.deepspeed_file import STRATEGIES, adopt_file
from sft_dist.config.schema import Recipe
from sft_dist.config.wishes import Wish, adopt
from sft_dist.errors import ConfigError

PRECISIONS = {"bf16": "bfloat16", "no": "float32"}
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PARALLEL_SIZES = {
    "TP_SIZE": "tensor parallelism is not available: shard with parallel.strategy=fsdp2",
    "CP_SIZE": "context parallelism is not available: parallel.sequence cuts rows (accelerate's sp_size)",
}
OFF = frozenset({"", "0", "no", "none", "false", "default"})
REMEDY = (
    "use accelerate launch --multi_gpu --num_processes {n} -m sft_dist.train ..., or sft-dist train ... --nproc {n}"
)


def check_launcher(
    recipe: Recipe, environ: MutableMapping[str, str] = os.environ, launchers: Sequence[Sequence[str]] = ()
) -> tuple[Recipe, list[str]]:
    """The recipe with the launcher's settings adopted, and one line for each thing worth telling.

    `launchers` are the command lines of the launchers above this process. Raises ConfigError on a contradiction, on a
    setting that cannot be had, and when fewer processes run than were asked for. ACCELERATE_USE_CPU hides the GPUs by
    setting CUDA_VISIBLE_DEVICES in `environ`, so call this before CUDA is touched.
    """
    check_world(environ, launchers)
    _refuse_unavailable(environ)
    notices = []
    for wish in _wishes(environ, launchers):
        recipe, notice = adopt(recipe, wish)
        notices += notice
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        recipe, notice = adopt_file(recipe)
        notices += notice
    if _is_on(environ, "ACCELERATE_USE_CPU"):
        environ["CUDA_VISIBLE_DEVICES"] = ""
    if environ.get("ACCELERATE_MIXED_PRECISION") == "no" and recipe.precision.compute != "float32":
        notices.append(f"accelerate was given no --mixed_precision: precision.compute={recipe.precision.compute} holds")
    return recipe, notices + [f"{name}={environ[name]} has no effect here" for name in _unused(environ)]


def check_world(environ: Mapping[str, str], launchers: Sequence[Sequence[str]] = ()) -> None:
    """Raise ConfigError when a launcher was told to start more processes than it did."""
    started = int(environ.get("WORLD_SIZE", 1))
    asked = _asked_of_accelerate(environ, launchers)
    if asked is not None and asked != str(started):
        raise ConfigError(
            f"accelerate launch was told to start {asked} processes and started {started} "
            f"(without --multi_gpu it runs the script once): {REMEDY.format(n=asked)}"
        )
    for name in MPI_SIZES:
        if int(environ.get(name, 1)) > 1 and "RANK" not in environ:
            raise ConfigError(
                f"{name}={environ[name]} but RANK is not set: start workers with torchrun or sft-dist, not mpirun"
            )


def _asked_of_accelerate(environ: Mapping[str, str], launchers: Sequence[Sequence[str]]) -> str | None:
    """How many processes accelerate was told to start, None when it says nothing.

    Its command line says it; else, where only its config file does, a MASTER_ADDR beside no RANK gives it away: it sets
    the address only for more than one process, and a launcher that really starts several sets RANK.
    """
    for argv in launchers:
        if _is_accelerate(argv) and (value := _option(argv, "num_processes")) is not None:
            return value
    is_script_run_once = "ACCELERATE_USE_CPU" in environ and "RANK" not in environ
    return "N" if is_script_run_once and "MASTER_ADDR" in environ else None


def _wishes(environ: Mapping[str, str], launchers: Sequence[Sequence[str]]) -> list[Wish]:
    """What the launcher asks for, where this trainer has a word for it."""
    found = [_precision_wish(environ, launchers)]
    found.append(_flag_wish(environ, "ACCELERATE_USE_FSDP", "parallel.strategy", "fsdp2"))
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        found.append(_flag_wish(environ, "FSDP_ACTIVATION_CHECKPOINTING", "memory.activation_checkpointing", "full"))
        found.append(_flag_wish(environ, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "memory.activation_offload", True))
    if (compiler := environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() == "inductor":
        found.append(Wish("ACCELERATE_DYNAMO_BACKEND", compiler, "precision.compile", True))
    found += _mesh_wishes(environ)
    if (clip := environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")).lower() not in OFF:
        found.append(Wish("ACCELERATE_GRADIENT_CLIPPING", clip, "optim.max_grad_norm", float(clip)))
    return [wish for wish in found if wish is not None] + _deepspeed_wishes(environ)


def _mesh_wishes(environ: Mapping[str, str]) -> list[Wish]:
    """Accelerate's mesh: ranks that share a row, and replicas of shards; replicas without shards are plain ones, but
    where FSDP is asked for. Raises ConfigError for a mesh of another number of ranks."""
    if not _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return []
    sizes = {name: environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in ("SP", "DP_REPLICATE", "DP_SHARD")}
    ranks, started = math.prod(map(int, sizes.values())), int(environ.get("WORLD_SIZE", 1))
    if ranks not in (1, started):
        mesh = ", ".join(f"PARALLELISM_CONFIG_{name}_SIZE={size}" for name, size in sizes.items())
        raise ConfigError(f"{mesh}: a mesh of {ranks} processes, and {started} were started: change one of them")
    found = []
    if int(sizes["SP"]) > 1:
        found.append(Wish("PARALLELISM_CONFIG_SP_SIZE", sizes["SP"], "parallel.sequence", int(sizes["SP"])))
    if (replicas := int(sizes["DP_REPLICATE"])) > 1:
        is_hybrid = int(sizes["DP_SHARD"]) > 1 or _is_on(environ, "ACCELERATE_USE_FSDP")
        key, value = ("parallel.dp_replicate", replicas) if is_hybrid else ("parallel.strategy", "ddp")
        found.append(Wish("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", sizes["DP_REPLICATE"], key, value))
    if int(sizes["DP_SHARD"]) > 1:
        found.append(Wish("PARALLELISM_CONFIG_DP_SHARD_SIZE", sizes["DP_SHARD"], "parallel.strategy", "fsdp2"))
    return found


def _deepspeed_wishes(environ: Mapping[str, str]) -> list[Wish]:
    """`--use_deepspeed`: its JSON file, or the stage and offloading that stand in accelerate's own words."""
    if not _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        return []
    if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return [Wish("ACCELERATE_DEEPSPEED_CONFIG_FILE", file, "parallel.deepspeed_config", file)]
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if not stage.isdigit() or int(stage) not in STRATEGIES:
        raise ConfigError(f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}: must be one of {', '.join(map(str, STRATEGIES))}")
    found = [Wish("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage, "parallel.strategy", STRATEGIES[int(stage)])]
    for what, word in (("PARAM", "params"), ("OPTIMIZER", "optimizer")):
        name = f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"
        device = environ.get(name, "none").lower()
        if device not in ("cpu", "none"):
            raise ConfigError(f"{name}={device}: only cpu memory is available; see parallel.offload")
        if device == "cpu":
            return [*found, Wish(name, device, "parallel.offload", word)]  # parameters mean the optimizer too
    return found


def _precision_wish(environ: Mapping[str, str], launchers: Sequence[Sequence[str]]) -> Wish | None:
    """`no` counts only where somebody wrote it: accelerate also sets it when nobody asked for anything."""
    said = environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    is_written = any(_is_accelerate(argv) and _option(argv, "mixed_precision") for argv in launchers)
    if not said or (said == "no" and not is_written):
        return None
    if said not in PRECISIONS:
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION={said}: not available; use bf16 or no (precision.compute)")
    return Wish("ACCELERATE_MIXED_PRECISION", said, "precision.compute", PRECISIONS[said])


def _flag_wish(environ: Mapping[str, str], variable: str, key: str, value: Any) -> Wish | None:
    return Wish(variable, environ[variable], key, value) if _is_on(environ, variable) else None


def _refuse_unavailable(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for what a launcher asks and this version cannot do."""
    for name, reason in _unavailable(environ):
        raise ConfigError(f"{name}={environ[name]}: {reason}")


def _unavailable(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        found.append(
            ("ACCELERATE_USE_MEGATRON_LM", "not available; start with --multi_gpu, parallel.strategy=fsdp2 shards")
        )
    if environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        found.append(
            (
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
                "accumulation follows from batch.tokens_per_step: set that instead",
            )
        )
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in OFF | {"inductor"}:
        found.append(("ACCELERATE_DYNAMO_BACKEND", "only inductor is available (precision.compile=true)"))
    found += [
        (f"PARALLELISM_CONFIG_{size}", reason)
        for size, reason in PARALLEL_SIZES.items()
        if _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG")
        and int(environ.get(f"PARALLELISM_CONFIG_{size}", 1)) > 1
    ]
    return found + (_unavailable_fsdp(environ) if _is_on(environ, "ACCELERATE_USE_FSDP") else [])


def _unavailable_fsdp(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    if _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        found.append(("FSDP_OFFLOAD_PARAMS", "use parallel.strategy=zero3 with parallel.offload=params"))
    for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
        if environ.get(name, "true").lower() not in ("true", "full_shard", "1"):
            found.append((name, "only full sharding is available (parallel.strategy=fsdp2)"))
    return found


def _unused(environ: Mapping[str, str]) -> list[str]:
    """ACCELERATE_* variables that say something and that nothing above has read."""
    read = (
        "MIXED_PRECISION",
        "USE_CPU",
        "USE_FSDP",
        "USE_PARALLELISM_CONFIG",
        "GRADIENT_CLIPPING",
        "GRADIENT_ACCUMULATION_STEPS",
        "DYNAMO_BACKEND",
        "USE_DEEPSPEED",
        "DEEPSPEED_ZERO_STAGE",
        "DEEPSPEED_CONFIG_FILE",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    )
    names = (name for name in environ if name.startswith("ACCELERATE_"))
    return sorted(n for n in names if n.removeprefix("ACCELERATE_") not in read and environ[n].lower() not in OFF)


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def _is_accelerate(argv: Sequence[str]) -> bool:
    return bool(_own_words(argv))


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name V` or `--name=V` among accelerate's own words, hyphens and underscores alike."""
    words = _own_words(argv)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, separator, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value if separator else following
    return None


def _own_words(argv: Sequence[str]) -> list[str]:
    """Accelerate's command line from its own name to the script's; empty when it is not accelerate's."""
    names = [word.rsplit("/", 1)[-1] for word in argv]
    programs = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
    start = next((i for i, name in enumerate(names[:6]) if name in programs), len(names))
    words = list(argv[start:])
    end = next((i for i, word in enumerate(words) if word in ("-m", "--module") or word.endswith(".py")), len(words))
    return words[:end]
