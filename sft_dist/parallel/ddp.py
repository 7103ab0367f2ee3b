"""Replicas: every rank holds the whole model, gradients are all-reduced as a sum."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sft_dist.parallel.engine import Engine, MakeOptimizer, live_engine


def build_ddp(packed: nn.Module, world_size: int, make_optimizer: MakeOptimizer) -> Engine:
    """Wrap for `world_size` replicas; one process needs no wrapper."""
    if world_size == 1:
        return _engine(packed, packed, _no_communication, make_optimizer)
    replica = DistributedDataParallel(packed, gradient_as_bucket_view=True)
    replica.register_comm_hook(None, _sum_gradients)

    @contextmanager
    def accumulate(is_last: bool) -> Iterator[None]:
        replica.require_backward_grad_sync = is_last
        yield

    return _engine(packed, replica, accumulate, make_optimizer)


def _engine(
    packed: nn.Module,
    forward: nn.Module,
    accumulate: Callable[[bool], AbstractContextManager[None]],
    make_optimizer: MakeOptimizer,
) -> Engine:
    return live_engine(
        "ddp", packed, forward, accumulate, make_optimizer, shards_parameters=False, reshard=_nothing_to_reshard
    )


def _nothing_to_reshard() -> None:
    """Replicas gather nothing."""


def _sum_gradients(_state: None, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP averages by default; the loop divides by the global token count, so it needs the plain sum."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


@contextmanager
def _no_communication(is_last: bool) -> Iterator[None]:
    yield


def assert_replicated(engine: Engine) -> None:
    """Every rank starts from the same tensors: compare a checksum of all parameters with rank 0's. Of their bits: the
    codes of a 4-bit base stand under a floating-point dtype, where some of them read as NaN."""
    total = torch.zeros((), dtype=torch.int64)
    for parameter in engine.model.parameters():
        total += parameter.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64).cpu()
    reference = total.clone()
    dist.broadcast(reference, src=0)
    if not torch.equal(total, reference):
        raise AssertionError("ranks start from different weights")
