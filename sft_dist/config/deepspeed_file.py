"""`parallel.deepspeed_config: ds.json`: what such a file says, in the words of a recipe.

Every leaf of the JSON ends in one of four ways, none is ignored:

    taken over   ADOPTED: the recipe is silent, so the value becomes the recipe's
    agreeing     the recipe says the same, or the file says "auto": the recipe decides
    harmless     HARMLESS: buckets, schedules and prints that our engine sets by itself; listed
    refused      a contradiction, a value that cannot be had (FIXED), or a key that nobody here knows, by name

DeepSpeed counts a micro-batch in sequences; a recipe counts tokens: n sequences are n packs of `data.seq_len` tokens.
Sources: https://www.deepspeed.ai/docs/config-json/ and the configuration classes of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft_dist.config.schema import Recipe
from sft_dist.config.wishes import Wish, adopt
from sft_dist.errors import ConfigError

STRATEGIES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_ZERO = "zero_optimization"


def _strategy(value: Any) -> str | None:
    return None if isinstance(value, bool) else STRATEGIES.get(value)


def _offload(word: str) -> Callable[[Any], str | None]:
    return lambda value: {"cpu": word, "none": "none", None: "none"}.get(value)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def _positive(value: Any) -> float | None:
    found = _number(value)
    return found if found else None


def _pair(value: Any) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if isinstance(value, list) and len(value) == 2 else None


# Leaf -> key of the recipe and how its value reads there; None: this value cannot be had.
ADOPTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    f"{_ZERO}.stage": ("parallel.strategy", _strategy),
    f"{_ZERO}.offload_optimizer.device": ("parallel.offload", _offload("optimizer")),
    f"{_ZERO}.offload_param.device": ("parallel.offload", _offload("params")),
    "bf16.enabled": ("precision.compute", {True: "bfloat16", False: "float32"}.get),
    "bfloat16.enabled": ("precision.compute", {True: "bfloat16", False: "float32"}.get),
    "gradient_clipping": ("optim.max_grad_norm", _positive),
    "optimizer.type": ("optim.name", {"AdamW": "adamw", "Adam": "adamw"}.get),
    "optimizer.params.lr": ("optim.lr", _positive),
    "optimizer.params.betas": ("optim.betas", _pair),
    "optimizer.params.eps": ("optim.eps", _positive),
    "optimizer.params.weight_decay": ("optim.weight_decay", _number),
    "scheduler.type": ("optim.schedule", SCHEDULES.get),
    "scheduler.params.warmup_max_lr": ("optim.lr", _positive),
    "activation_checkpointing.cpu_checkpointing": ("memory.activation_offload", {True: True, False: False}.get),
}
# Leaf -> the values under which it changes nothing, and what to do about any other.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "fp16.enabled": ((False,), "fp16 is not available; use bf16 (precision.compute=bfloat16)"),
    "amp.enabled": ((False,), "apex is not available; use bf16 (precision.compute=bfloat16)"),
    "optimizer.params.adam_w_mode": ((True,), "only decoupled weight decay (AdamW) is available"),
    "scheduler.params.warmup_min_lr": ((0, None), "warm-up starts at zero"),
    "scheduler.params.warmup_num_steps": ((), 'say optim.warmup_fraction in the recipe and "auto" here'),
    "scheduler.params.total_num_steps": (
        (),
        'the plan knows the steps: say "auto" here, optim.max_steps in the recipe',
    ),
    f"{_ZERO}.offload_optimizer.ratio": ((1, 1.0), "the optimizer is offloaded whole"),
    f"{_ZERO}.cpu_offload": ((False, None), f"say {_ZERO}.offload_optimizer.device"),
    f"{_ZERO}.zero_hpz_partition_size": ((1,), "hierarchical partitioning is parallel.dp_replicate with fsdp2"),
    f"{_ZERO}.zero_quantized_weights": ((False,), "quantised collectives are not available"),
    f"{_ZERO}.zero_quantized_gradients": ((False,), "quantised collectives are not available"),
    f"{_ZERO}.zero_quantized_nontrainable_weights": ((False,), "quantised collectives are not available"),
    f"{_ZERO}.mics_shard_size": ((-1,), "MiCS is parallel.dp_replicate with fsdp2"),
    f"{_ZERO}.legacy_stage1": ((False,), "only today's stage 1 is available"),
    f"{_ZERO}.pipeline_loading_checkpoint": ((False,), "checkpoints are this project's own"),
    "communication_data_type": ((None, "fp32"), "gradients are summed in fp32"),
    "prescale_gradients": ((False,), "gradients are summed and divided once by the tokens of the step"),
    "gradient_predivide_factor": ((1, 1.0), "gradients are summed and divided once by the tokens of the step"),
    "sparse_gradients": ((False,), "embeddings have dense gradients here"),
    "elasticity.enabled": ((False,), "any number of processes continues a run here"),
    "compression_training": ((), "compression is not available"),
    "curriculum_learning.enabled": ((False,), "the plan of the data is fixed by the seed"),
    "tensorboard.enabled": ((False,), "say log.trackers=[tensorboard]"),
    "wandb.enabled": ((False,), "say log.trackers=[wandb]"),
    "comet.enabled": ((False,), "not available; see log.trackers"),
}
# Leaves or whole sections that our engine sets by itself or that only print; `*` ends a section.
HARMLESS = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "disable_allgather", "aio.*", "activation_checkpointing.*", "flops_profiler.*",
    "comms_logger.*", "csv_monitor.*", "fp16.*", "amp.*", "tensorboard.*", "wandb.*", "comet.*", "checkpoint.*",
    "elasticity.*", "curriculum_learning.*", "bf16.*", "data_types.*", "optimizer.params.torch_adam",
    "scheduler.params.warmup_type",
    *(f"{_ZERO}.{name}" for name in (
        "allgather_partitions", "allgather_bucket_size", "reduce_bucket_size", "reduce_scatter", "overlap_comm",
        "contiguous_gradients", "round_robin_gradients", "sub_group_size", "load_from_fp32_weights",
        "ignore_unused_parameters", "elastic_checkpoint", "stage3_prefetch_bucket_size", "prefetch_bucket_size",
        "stage3_param_persistence_threshold", "param_persistence_threshold", "stage3_max_live_parameters",
        "max_live_parameters", "stage3_max_reuse_distance", "max_reuse_distance", "stage3_module_granularity_threshold",
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "gather_16bit_weights_on_model_save", "memory_efficient_linear", "offload_optimizer.*", "offload_param.*",
        "stage3_model_persistence_threshold", "model_persistence_threshold", "stage3_allgather_sequential",
        "stage3_use_all_reduce_for_fetch_params", "enable_sanity_checks", "parameter_alignment", "compute_grad_norm",
        "override_module_apply", "log_trace_cache_warnings", "use_multi_rank_bucket_allreduce",
    )),
)  # fmt: skip
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def adopt_file(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with its DeepSpeed file adopted, and one line for each thing worth telling.

    Raises ConfigError naming the leaf: a contradiction, an unavailable value, an unknown key, a file that is no JSON.
    """
    path = recipe.parallel.deepspeed_config
    if path is None:
        return recipe, []
    leaves = dict(_leaves(_read(path)))
    wishes, harmless, faults = [], [], []
    for leaf, value in leaves.items():
        if value == "auto" or leaf in _SIZES:
            continue
        if leaf in ADOPTED:
            key, convert = ADOPTED[leaf]
            meant = convert(value) if isinstance(value, (str, int, float, bool, list, type(None))) else None
            if meant is None:
                faults.append(f"{path}: {leaf}={json.dumps(value)}: not available; see {key}")
            else:
                wishes.append(Wish(f"{path}: {leaf}", json.dumps(value), key, meant))
        elif leaf in FIXED and value not in FIXED[leaf][0]:
            faults.append(f"{path}: {leaf}={json.dumps(value)}: {FIXED[leaf][1]}")
        elif leaf in FIXED or _is_harmless(leaf):
            harmless.append(leaf)
        else:
            faults.append(f"{path}: {leaf}: unknown here, and nothing is ignored{_hint(leaf)}: remove it")
    if faults:
        raise ConfigError("\n".join(faults))
    return _taken(recipe, path, [*_merged(wishes), *_sizes(recipe, path, leaves)], harmless)


def _taken(recipe: Recipe, path: str, wishes: list[Wish], harmless: list[str]) -> tuple[Recipe, list[str]]:
    notices = []
    for wish in wishes:
        recipe, told = adopt(recipe, wish, change=f"change {path} or the recipe")
        notices += told
    if harmless:
        notices.append(f"{path}: no effect here, the engine decides: {', '.join(harmless)}")
    try:  # together, taken values must be a recipe too
        return Recipe.model_validate(recipe.model_dump(exclude_unset=True)), notices
    except ValidationError as error:
        reasons = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError(f"{path}: with its settings taken over, {reasons}") from error


def _merged(wishes: list[Wish]) -> list[Wish]:
    """One wish for each key: parameters offloaded mean the optimizer too; else what is said twice must agree."""
    kept: dict[str, Wish] = {}
    for wish in wishes:
        former = kept.get(wish.key)
        if former is None or (wish.key == "parallel.offload" and former.value in ("none", "optimizer")):
            kept[wish.key] = wish if former is None or wish.value != "none" else former
        elif wish.key != "parallel.offload" and former.value != wish.value:
            raise ConfigError(
                f"{former.variable}={former.said} and {wish.variable}={wish.said} differ: "
                f"both mean {wish.key}; keep one of them"
            )
    return list(kept.values())


def _sizes(recipe: Recipe, path: str, leaves: Mapping[str, Any]) -> Iterator[Wish]:
    """Batch sizes in sequences as tokens. What follows from the number of processes is no number of a recipe."""
    given = {name: leaves[name] for name in _SIZES if leaves.get(name, "auto") != "auto"}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f'{path}: {name}={json.dumps(value)}: must be a whole number from 1 on, or "auto"')
    if "gradient_accumulation_steps" in given and "train_batch_size" not in given:
        raise ConfigError(
            f"{path}: gradient_accumulation_steps={given['gradient_accumulation_steps']}: a step has the same tokens "
            f'on any number of processes here: say train_batch_size (sequences of all processes), or "auto"'
        )
    micro, total = given.get("train_micro_batch_size_per_gpu"), given.get("train_batch_size")
    rounds = given.get("gradient_accumulation_steps", 1)
    if micro and total and total % (micro * rounds):
        raise ConfigError(
            f"{path}: train_batch_size={total} is no multiple of train_micro_batch_size_per_gpu={micro} x "
            f"gradient_accumulation_steps={rounds}: DeepSpeed refuses this too"
        )
    for name, key in ((_SIZES[1], "batch.tokens_per_micro_batch"), (_SIZES[0], "batch.tokens_per_step")):
        if name in given:
            yield Wish(f"{path}: {name}", str(given[name]), key, given[name] * recipe.data.seq_len)


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"parallel.deepspeed_config={path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"parallel.deepspeed_config={path}: cannot be read as JSON ({error})") from error


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is no object."""
    if not isinstance(tree, dict):
        if not prefix:
            raise ConfigError("parallel.deepspeed_config: the file must hold a JSON object")
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _is_harmless(leaf: str) -> bool:
    return any(leaf == known or (known.endswith("*") and leaf.startswith(known[:-1])) for known in HARMLESS)


def _hint(leaf: str) -> str:
    near = difflib.get_close_matches(leaf, [*ADOPTED, *FIXED, *HARMLESS, *_SIZES], n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""
