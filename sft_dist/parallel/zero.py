"""DeepSpeed ZeRO (Rajbhandari et al., 2020): optimizer state (1), gradients (2), parameters (3) split over all ranks.

In goes the model on the CPU and our own AdamW; out comes an engine that the loop drives like any other. DeepSpeed is
called directly: through Accelerate it would want to own the process group, the scheduler and a global configuration
object, and `Accelerator(cpu=True)` ignores the plugin without a word.

- **Sum, not average.** DeepSpeed divides gradients by the world size (stage 3 has no other way), so the gradient of
  each loss sum is multiplied by it first: exact for powers of two, one rounding otherwise.
- **Our AdamW.** DeepSpeed exchanges its parameters for this rank's flat fp32 partitions; the update is the same one.
  With offload it runs on the CPU, where the fused AdamW of PyTorch needs no compiled extension.
- **Our checkpoints**, which any engine at any world size continues: `zero_state`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sft_dist.parallel import zero_state
from sft_dist.parallel.engine import (
    Engine,
    MakeOptimizer,
    StoredWeights,
    global_numel,
    trained_parameters,
)
from sft_dist.parallel.runtime import Runtime
from sft_dist.parallel.zero_state import write_partition
from sft_dist.types import PackedBatch

# Without this DeepSpeed compiles an extension for collectives on CPUs; a process that dies meanwhile leaves a lock on
# which every later one waits for ever.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# It also calls collectives by names that PyTorch 2.13 renames, once per gather.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

BUCKET_ELEMENTS = 50_000_000  # of one collective at most: 200 MB in fp32
BUCKET_SHARE = 8  # and this part of what is trained in stage 3, which holds a bucket from start to end
# Of stage 3; DeepSpeed's own defaults, written down because `estimate.memory` counts with them.
PREFETCH_ELEMENTS = 50_000_000  # gathered ahead in one collective
LIVE_ELEMENTS = 10**9  # gathered at most
MOVED_ELEMENTS = 10**9  # of a rank's partition, updated at a time


def build_zero(
    stage: int,
    packed: nn.Module,
    place: Runtime,
    compute_dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
    offload: str,
    weights: StoredWeights | None = None,
) -> Engine:
    """Partition `packed` (on the CPU, equal on every rank) in place; `offload` is none, optimizer or params (stage 3).

    Stages 1 and 2 leave the parameters in their dtype; stage 3 holds them in `compute_dtype`, with fp32 masters, and
    takes the values of a model without memory from `weights`, one tensor at a time.
    """
    settings = configuration(stage, packed, place.device, compute_dtype, offload)
    finer = _make_partitions(stage, packed, settings, compute_dtype, weights)
    trained = trained_parameters(packed)
    made, wrapper, _, _ = deepspeed.initialize(
        model=packed, optimizer=make_optimizer(trained), config=settings, dist_init_required=False
    )
    assert_partitioned(made, stage, place.world_size, place.device)
    wrapper.optimizer.allocate(partitions(wrapper))
    for name, weight in finer.items():
        write_partition(trained[name], weight(), None)  # DeepSpeed has made the masters from the narrower copy
    if stage < 3:
        wrapper._lazy_init_hp_params_optimizer_state()  # links each parameter to its part of the moments
    return _engine(stage, packed, place, made, wrapper, trained)


def _engine(
    stage: int, packed: nn.Module, place: Runtime, made: Any, wrapper: Any, trained: dict[str, nn.Parameter]
) -> Engine:
    """What DeepSpeed `made` of the model, with the `wrapper` of the optimizer, as the loop drives it."""

    def forward(batch: PackedBatch) -> Tensor:
        loss_sum = made(batch)
        loss_sum.register_hook(lambda gradient: gradient * place.world_size)
        return loss_sum

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        made.set_gradient_accumulation_boundary(is_last)
        yield

    def clip_grad_norm(max_norm: float) -> Tensor:
        wrapper.clip_grad = max_norm  # `wrapper.step` scales by the norm that it computes again
        return _global_norm(wrapper)

    def adopt(tensors: Mapping[str, Tensor]) -> None:
        zero_state.adopt(trained, stage, tensors)
        if stage < 3:
            wrapper.update_lp_params()

    return Engine(
        name=f"zero{stage}",
        packed=packed,
        forward=forward,
        accumulate=accumulate,
        clip_grad_norm=clip_grad_norm,
        optimizer=wrapper,
        shards_parameters=stage == 3,
        reshard=_released_by_hooks,
        trained=trained,
        state=partial(zero_state.state, trained, init_device_mesh("cpu", (place.world_size,))),
        shows_copies=True,
        adopt=adopt,
        gradients=partial(zero_state.gradients, trained),
        discard_gradients=partial(_discard_gradients, wrapper, stage),
        whole=zero_state.gather,
    )


def configuration(
    stage: int, packed: nn.Module, device: torch.device, compute_dtype: torch.dtype, offload: str
) -> dict[str, Any]:
    """What DeepSpeed is told. Batch sizes are for its statistics only: the loop says where a step ends."""
    place = {"device": "cpu", "pin_memory": device.type == "cuda"}
    trained = sum(global_numel(p) for p in packed.parameters() if p.requires_grad)
    bucket = min(BUCKET_ELEMENTS, trained // BUCKET_SHARE) if stage == 3 else BUCKET_ELEMENTS
    largest_vector = max((p.numel() for p in packed.parameters() if p.ndim < 2), default=0)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": largest_vector,  # norms and biases stay gathered, matrices never
        "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
        "sub_group_size": MOVED_ELEMENTS,
    }
    if offload != "none":
        zero["offload_optimizer"] = place
    if offload == "params":
        zero["offload_param"] = place
    precision: dict[str, Any] = {}
    if stage == 3 and compute_dtype == torch.bfloat16:
        precision = {
            "bf16": {"enabled": True},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return {
        **precision,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def partitions(wrapper: Any) -> list[Tensor]:
    """This rank's flat fp32 master weights: what AdamW really moves."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3
        return list(wrapper.fp32_partitioned_groups_flat)
    return list(wrapper.single_partition_of_fp32_groups)


def assert_partitioned(made: Any, stage: int, world_size: int, device: torch.device) -> None:
    """Asking for ZeRO must not silently give replicas: stage, ranks, and what this rank really holds."""
    found = (made.zero_optimization_stage(), made.dp_world_size, get_accelerator().device_name())
    if found != (stage, world_size, device.type):
        raise AssertionError(f"stage, ranks and device: {(stage, world_size, device.type)} became {found}")
    parameters = list(made.module.parameters())
    trained = [global_numel(p) for p in parameters if p.requires_grad]
    held, total = sum(t.numel() for t in partitions(made.optimizer)), sum(trained)
    padding = 4 * world_size * len(trained)
    if not total <= held * world_size <= total + padding:
        raise AssertionError(f"zero{stage}: this rank moves {held} of {total} weights, not 1/{world_size} of them")
    whole = [p for p in parameters if stage == 3 and p.ds_tensor.numel() != math.ceil(p.ds_numel / world_size)]
    if whole:
        raise AssertionError(f"zero3 left {len(whole)} parameters whole")


def _make_partitions(
    stage: int, packed: nn.Module, settings: dict[str, Any], dtype: torch.dtype, weights: StoredWeights | None
) -> Mapping[str, Callable[[], Tensor]]:
    """Fill a model without memory from `weights`. Returns how to read, by name, the trained values that are finer than
    the `dtype` in which stage 3 holds them."""
    if weights is not None:
        return _partition_from(weights, packed, settings, dtype)
    if stage < 3:
        return {}
    trained = trained_parameters(packed)
    return {name: p.detach().clone for name, p in trained.items() if not _fits(p.detach(), dtype)}


def _partition_from(
    weights: StoredWeights, packed: nn.Module, settings: dict[str, Any], dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Values for every parameter, in `dtype`, each cut among the ranks before the next one is read. Returns those that
    are trained and finer than `dtype`, by name."""
    cut = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)
    finer: dict[str, Callable[[], Tensor]] = {}

    def hold(name: str, parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
        if parameter.requires_grad and not _fits(value, dtype):
            finer[name] = partial(weights.value, name, parameter)
        held = nn.Parameter(value.to(dtype), requires_grad=parameter.requires_grad)
        cut._convert_to_zero_parameters([held])
        return held

    weights.load(packed.model, hold)  # type: ignore[arg-type]
    return finer


def _global_norm(wrapper: Any) -> Tensor:
    """Global 2-norm of the summed gradients; NaN where DeepSpeed says -1 for infinity and NaN."""
    if hasattr(wrapper, "scaled_global_norm"):
        groups = [wrapper.scaled_global_norm()]
    else:
        groups = wrapper._get_norm_groups()
    norms = torch.stack([group.float() for group in groups])
    return torch.linalg.vector_norm(torch.where(norms < 0, torch.nan, norms))


def _discard_gradients(wrapper: Any, stage: int) -> None:
    """What DeepSpeed does itself when a step overflows: forget the sums and count micro-batches anew."""
    if stage == 3:
        wrapper._pre_step()
        wrapper._overflow_clean_up(None)
        return
    wrapper.micro_step_id = INITIAL_MICRO_STEP_ID
    wrapper.zero_grad()
    if wrapper.cpu_offload:
        wrapper._offload_accumulated_param_ids = set()
        wrapper.reset_cpu_buffers()
    else:
        for kept in (wrapper.averaged_gradients, wrapper.all_grad_tensors):  # parameters look into these very objects
            kept.update(dict.fromkeys(kept))


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every value exactly."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _released_by_hooks() -> None:
    """Stage 3 gives parameters back when the module that gathered them is done."""
