"""One rank: the layout certificate of each engine on sound code, then on code with one fault at a time.

`python layout_worker.py FOLDER`. Faults are put into the real engines and the real loop, never into the certificate.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zero_worker
from architectures import tiny_config

from sft_dist import train
from sft_dist.assembly import spread
from sft_dist.config.auto import Choices
from sft_dist.config.schema import Recipe
from sft_dist.errors import CertificateError
from sft_dist.layout_certificate import certify_layout
from sft_dist.models.load import build_random
from sft_dist.network import tune
from sft_dist.parallel import ddp, fsdp
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.parallel.sequence import sequence_group
from sft_dist.resilience.ending import run_and_end

Fault = Callable[[], Any]
TWO = [("ddp", "none"), ("fsdp2", "none"), ("zero1", "none"), ("zero2", "optimizer"), ("zero3", "params")]

METHODS = ("qlora", "prompt")  # in bf16, as a 4-bit base needs it


def recipe(
    strategy: str, method: str = "full", offload: str = "none", dp_replicate: int = 1, sequence: int = 1
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "x"},
            "data": {"sources": [{"path": "d.json"}]},
            "tuning": {"method": method, **({"rank": 3, "dropout": 0.1} if method == "lora" else {})},
            "parallel": {"strategy": strategy, "offload": offload, "dp_replicate": dp_replicate, "sequence": sequence},
        }
    )


def figures(
    asked: Recipe,
    place: Runtime,
    compute: str = "float32",
    step: Callable[..., Any] = train.train_step,
    keep: str = "none",
) -> dict[str, float] | str:
    """What each check found, or the refusal."""
    choices = Choices(1, 4, 1e-3, asked.parallel.strategy, keep, compute)
    config = tiny_config("llama")
    try:
        sequence = sequence_group(asked.parallel.sequence, place)
        return {c.name: c.figure for c in certify_layout(asked, choices, config, place, step, sequence=sequence)}
    except (CertificateError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return str(error) if isinstance(error, CertificateError) else f"{type(error).__name__}: {error}"


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def engine_with(**parts: Callable[[Engine], Any]) -> Any:
    """`spread` whose engines have some of their functions exchanged."""
    import sft_dist.layout_certificate as module

    real = module.spread

    def faulty(*arguments: Any) -> Engine:
        made = real(*arguments)
        return replace(made, **{name: change(made) for name, change in parts.items()})

    return replaced(module, "spread", faulty)


def no_sync_ddp() -> Any:
    def alone(_state, bucket):  # type: ignore[no-untyped-def]  # DDP wants the types themselves, not their names
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    return replaced(ddp, "_sum_gradients", alone)


def mean_ddp() -> Any:
    def mean(_state, bucket):  # type: ignore[no-untyped-def]
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    return replaced(ddp, "_sum_gradients", mean)


def scaled_loss(factor: float) -> Fault:
    """Gradients of every loss divided once more, as averaging over ranks or micro-batches would."""

    def forward(made: Engine) -> Any:
        def run(batch: Any) -> torch.Tensor:
            loss = made.forward(batch)
            return loss + (factor - 1) * (loss - loss.detach())

        return run

    return lambda: engine_with(forward=forward)


def only_last_round() -> Any:
    """Earlier micro-batches are forgotten."""

    def accumulate(made: Engine) -> Any:
        @contextmanager
        def run(is_last: bool) -> Iterator[None]:
            if is_last:
                made.optimizer.zero_grad()
            with made.accumulate(is_last):
                yield

        return run

    return engine_with(accumulate=accumulate)


def never_between_replicas() -> Any:
    return engine_with(accumulate=lambda made: lambda is_last: made.accumulate(False))


def clip(rule: Callable[[Engine, float], float], told: float = 1.0) -> Fault:
    """Clips to another norm than asked for, and reports the true one times `told`."""
    return lambda: engine_with(
        clip_grad_norm=lambda made: lambda max_norm: made.clip_grad_norm(rule(made, max_norm)) * told
    )


def local_clip() -> Any:
    """The norm of this rank's shards only."""

    def clip_grad_norm(made: Engine) -> Any:
        def run(max_norm: float) -> torch.Tensor:
            local = [p.grad.to_local() for p in made.trained.values() if p.grad is not None]  # type: ignore[attr-defined]
            norm = torch.stack([g.norm() for g in local]).norm()
            for g in local:
                g.mul_(min(1.0, max_norm / norm.item()))
            return norm

        return run

    return engine_with(clip_grad_norm=clip_grad_norm)


def mean_fsdp() -> Any:
    def force(self: Any, factor: float) -> None:
        real(self, float(dist.get_world_size()))

    real = fsdp.FSDPModule.set_gradient_divide_factor
    return replaced(fsdp.FSDPModule, "set_gradient_divide_factor", force)


def wrong_divisor(*arguments: Any, **options: Any) -> Any:
    """The loop divides by this rank's own count: a mean of means."""
    engine, loaded = arguments
    own = sum(int((batch.labels >= 0).sum()) for batch in loaded.batches)
    whole = loaded.step.loss_weight_sum
    loss = engine.forward
    return train.train_step(replace(engine, forward=lambda batch: loss(batch) * (whole / own)), loaded, **options)


FAULTS: dict[str, tuple[str, Fault]] = {
    "ddp: gradients are not exchanged": ("ddp", no_sync_ddp),
    "ddp: mean in place of sum": ("ddp", mean_ddp),
    "ddp: divided twice": ("ddp", scaled_loss(0.5)),
    "ddp: earlier micro-batches forgotten": ("ddp", only_last_round),
    "ddp: not clipped": ("ddp", clip(lambda made, norm: 1e9)),
    "ddp: clipped to the half": ("ddp", clip(lambda made, norm: norm / 2)),
    "ddp: norm told after clipping": ("ddp", clip(lambda made, norm: norm, told=0.5)),
    "fsdp2: mean in place of sum": ("fsdp2", mean_fsdp),
    "fsdp2: norm of own shards": ("fsdp2", local_clip),
    "fsdp2: not clipped": ("fsdp2", clip(lambda made, norm: 1e9)),
    "zero2: divided twice": ("zero2", scaled_loss(0.5)),
    "zero3: divided twice": ("zero3", scaled_loss(0.5)),
    "zero3: not clipped": ("zero3", clip(lambda made, norm: 1e9)),
}
FAULTS_OF_FOUR: dict[str, Fault] = {
    "hsdp: replicas are not added up": never_between_replicas,
    "hsdp: divided twice": scaled_loss(0.5),
}


def untouched(place: Runtime) -> dict[str, bool]:
    """Whether a run's own state and random numbers are the same bits after a certificate was made beside it."""
    asked = recipe("fsdp2", "lora")
    network = tune(build_random(tiny_config("llama"), dtype=torch.float32, seed=3), asked, torch.float32, place.device)
    made = spread(network, asked, Choices(1, 4, 1e-3, "fsdp2", "none", "float32"), place)
    random, before = torch.get_rng_state(), digest(made)
    assert not isinstance(figures(asked, place), str)
    return {"state": digest(made) == before, "random": torch.equal(torch.get_rng_state(), random)}


def digest(made: Engine) -> str:
    """SHA-256 of this rank's weights, trained or not, gradients and moments."""
    total, tensors = hashlib.sha256(), dict(made.state())
    tensors |= {f"all.{name}": p.detach() for name, p in made.model.named_parameters()}
    tensors |= {f"grad.{name}": p.grad for name, p in made.trained.items() if p.grad is not None}
    for name, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        total.update(name.encode() + local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def discarded(strategy: str, offload: str, place: Runtime) -> bool:
    """Whether steps after gradients were made and dropped are those without: what a rehearsal leaves behind."""
    case, found = f"{strategy}-{offload}-full-2-float32", []
    for rehearsed in (False, True):
        made = zero_worker.build(case, place)
        if rehearsed:
            for index, batch in enumerate(zero_worker.load_step(9, 2, place).batches):
                with made.accumulate(index == 1 and strategy != "ddp"):
                    made.forward(batch).backward()
            made.discard_gradients()
        found.append([(r.loss, r.grad_norm) for r in zero_worker.train(made, range(1, 4), 2, place)])
    return found[0] == found[1]


def main(folder: Path) -> None:
    found: dict[str, Any] = {"sound": {}, "faults": {}}
    with runtime() as place:
        torch.set_num_threads(1)
        engines = {1: [("ddp", "none")], 2: TWO, 4: [("fsdp2", "none")]}[place.world_size]
        replicas = 2 if place.world_size == 4 else 1
        for strategy, offload in engines:
            for method in ("full", "lora"):
                name = f"{strategy}-{offload}-{method}-{place.world_size}"
                found["sound"][name] = figures(recipe(strategy, method, offload, replicas), place)
        if place.world_size == 2:
            for strategy in ("ddp", "fsdp2", "zero3"):
                for method in METHODS:
                    found["sound"][f"{strategy}-{method}-bfloat16"] = figures(
                        recipe(strategy, method), place, "bfloat16"
                    )
                found["sound"][f"{strategy}-sequence"] = figures(recipe(strategy, sequence=2), place)
                found["sound"][f"{strategy}-bfloat16"] = figures(recipe(strategy), place, "bfloat16")
                found["sound"][f"{strategy}-selective"] = figures(recipe(strategy), place, keep="selective")
                found["sound"][f"{strategy}-lora-full"] = figures(recipe(strategy, "lora"), place, keep="full")
            found["untouched"] = untouched(place)
            found["discarded"] = {f"{s}-{o}": discarded(s, o, place) for s, o in [*TWO, ("zero3", "none")]}
            for name, (strategy, fault) in FAULTS.items():
                with fault():
                    found["faults"][name] = figures(recipe(strategy), place)
            found["faults"]["loop: mean of means"] = figures(recipe("ddp"), place, step=wrong_divisor)
        if place.world_size == 4:
            both = recipe("fsdp2", dp_replicate=2, sequence=2)
            found["sound"]["hsdp-sequence"] = figures(both, place)
            for name, fault in FAULTS_OF_FOUR.items():
                with fault():
                    found["faults"][name] = figures(recipe("fsdp2", dp_replicate=2), place)
        (folder / f"found-{place.world_size}-{place.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1])))
