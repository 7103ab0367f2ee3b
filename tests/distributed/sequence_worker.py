"""One rank: twenty steps of the real loop's step with each row cut among k ranks, certificates, mutations.

`python sequence_worker.py FOLDER K:CASE...`, a case being STRATEGY-METHOD-ACCUMULATION-VARIANT. Where all ranks share
each row, every architecture is certified with its rows cut as well, and each mutation of the cut is tried.
`found-WORLD-K.json` has it all.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import PACKABLE, tiny_config
from torch import Tensor
from transformers import PretrainedConfig
from zero_worker import MAX_NORM, OPTIM, STEPS, documents

from sft_dist.certify import Documents, certify, merge
from sft_dist.config.schema import TuningSection
from sft_dist.data.collate import collate
from sft_dist.data.loader import LoadedStep
from sft_dist.errors import CertificateError
from sft_dist.models import attention
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import build_random
from sft_dist.models.packed import PackedCausalLM, causal_lm, decoder_layers
from sft_dist.optim import build_optimizer
from sft_dist.parallel import sequence as module
from sft_dist.parallel.build import CASTS_ITSELF, build_engine
from sft_dist.parallel.engine import Engine
from sft_dist.parallel.runtime import Runtime, runtime
from sft_dist.parallel.sequence import SequenceGroup, sequence_group, share_dropout
from sft_dist.resilience.ending import run_and_end
from sft_dist.train import train_step
from sft_dist.types import IGNORE_INDEX, PackedBatch, StepPlan
from sft_kernels import choose_head

CPU = torch.device("cpu")
HEAD = choose_head("reference", CPU)[1]
MICRO_BATCHES = 2  # of a step at accumulation 1: one for each of two groups
ONE_KEY_HEAD = {"num_key_value_heads": 1}
ODD_HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6}  # 4 ranks do not divide the key heads


def load_step(
    step: int, accumulation: int, place: Runtime, sequence: SequenceGroup, *, multiple: int, sparse: bool
) -> LoadedStep:
    """Micro-batches of three documents, dealt to groups as the loader does; odd lengths unless `multiple` says else.

    `sparse`: only the last token of each document is learned, so that slices without any come up; one micro-batch is
    missing, so that a group of two works on an empty one; and every fifth step has one short document at most.
    """
    number = MICRO_BATCHES * accumulation - sparse
    probe = documents(1000 + step % 5, 3 * number)
    if sparse:
        kept = [replace(x, loss_weights=np.eye(len(x.input_ids), dtype=np.float32)[-1]) for x in probe.examples]
        probe = Documents(tuple(kept))
    cuts = tuple(probe.packs[i : i + 1 if sparse and step % 5 == 0 else i + 3] for i in range(0, 3 * number, 3))
    num_groups = place.world_size // sequence.size
    mine = range(place.rank // sequence.size, -(-number // num_groups) * num_groups, num_groups)
    pad = sequence.pad_multiple(multiple)
    dealt = [cuts[i] if i < number else () for i in mine]
    whole = [collate(cut, probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=pad) for cut in dealt]
    return LoadedStep(StepPlan(step, 0, cuts), tuple(map(sequence.cut, whole)), tuple(mine), "")


def build(case: str, place: Runtime, sequence: SequenceGroup) -> Engine:
    strategy, method, _, variant = case.split("-")
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    full = method == "full"
    model = build_random(tiny_config("llama"), dtype=torch.float32 if full else dtype, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa", sequence.across)
    tuning = TuningSection(method=method, rank=3, dropout=0.3 if variant == "dropout" else 0.0)
    tuned = apply_tuning(model, tuning, seed=0)
    share_dropout(tuned, sequence)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if variant == "recomputed":
        causal_lm(tuned).gradient_checkpointing_enable({"use_reentrant": False})
    autocast = dtype if strategy not in CASTS_ITSELF and dtype != torch.float32 else None
    packed = PackedCausalLM(tuned, HEAD, autocast_dtype=autocast)
    make_optimizer = partial(build_optimizer, optim=OPTIM, lr=1e-3)
    return build_engine(strategy, packed.train(), decoder_layers(causal_lm(tuned)), place, dtype, make_optimizer)


def run(case: str, place: Runtime, sequence: SequenceGroup) -> dict[str, list[float]]:
    """Loss and gradient norm of each step."""
    _, _, accumulation, variant = case.split("-")
    made = build(case, place, sequence)
    multiple = 8 if variant == "dropout" else 1  # equal masks need rows of equal length
    results = [
        train_step(
            made,
            load_step(step, int(accumulation), place, sequence, multiple=multiple, sparse=variant == "sparse"),
            lr=1e-3 * (1 - step / 40),
            max_norm=MAX_NORM,
            seed=5,
            device=place.device,
            stop=False,
        )
        for step in range(1, STEPS + 1)
    ]
    return {figure: [getattr(result, figure) for result in results] for figure in ("loss", "grad_norm")}


def prove(config: PretrainedConfig, sequence: SequenceGroup, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Figures of the certificate with rows cut, by name of the check."""
    model = build_random(config, dtype=dtype, seed=0)
    model.config.use_cache = False
    attention.install(model, "sdpa", sequence.across)
    packed = PackedCausalLM(model, HEAD).eval()

    @torch.no_grad()
    def hidden(batch: PackedBatch) -> Tensor:
        return packed.hidden_states(batch)

    kind = {"head": HEAD, "backend": "sdpa", "packing": "best_fit", "device": CPU, "dtype": dtype}
    checks = certify(hidden, config, **kind, sequence=sequence)
    return {check.name.split(":")[0]: check.figure for check in checks}


def dispatched(sequence: SequenceGroup) -> dict[str, dict[str, Any]]:
    """What each kernel would be called with: CUDA's own cannot run here, so the reference answers in their place."""
    probe = documents(3, 5)
    row = collate([merge(probe.packs)], probe, packing="best_fit", pad_token_id=0, pad_to_multiple_of=sequence.size)
    found: dict[str, dict[str, Any]] = {"expected": {"edges": row.cu_seqlens.tolist(), "longest": row.max_seqlen}}
    for name, original in attention.BACKENDS.items():
        calls: list[dict[str, Any]] = []

        def record(query: Tensor, key: Tensor, value: Tensor, calls: list = calls, **facts: Any) -> Tensor:
            shapes = [list(tensor.shape) for tensor in (query, key, value)]
            calls.append({"shapes": shapes, "edges": facts["cu_seqlens"].tolist(), "longest": facts["max_seqlen"]})
            segments = attention.Segments.of(facts["cu_seqlens"])
            return attention.sdpa_segments(query, key, value, **facts | {"segments": segments})

        attention.BACKENDS[name] = record
        try:
            model = build_random(tiny_config("llama"), dtype=torch.float32, seed=0)
            attention.install(model, name, sequence.across)
            packed = PackedCausalLM(model, HEAD).eval()
            states = sequence.join(packed.hidden_states(sequence.cut(row)).detach())
        finally:
            attention.BACKENDS[name] = original
        found[name] = {"calls": calls, "sum": states.double().sum().item(), "length": states.shape[1]}
    return found


def architectures() -> Iterator[tuple[str, PretrainedConfig]]:
    """Everything that can be packed, and grouped heads that ranks do not divide evenly."""
    for name in PACKABLE:
        yield name, tiny_config(name)
    for name, changes in (("one key head", ONE_KEY_HEAD), ("odd heads", ODD_HEADS)):
        config = tiny_config("llama")
        config.update(changes)
        yield name, config


def edges_of_the_slice(batch: PackedBatch, cut: Callable[[PackedBatch], PackedBatch]) -> PackedBatch:
    """Every rank believes that its slice is the row: documents end where the slice does."""
    own = cut(batch)
    length, total = own.input_ids.shape[1], batch.input_ids.shape[1]
    edges = sorted({*batch.cu_seqlens.tolist(), *range(0, total, length)})
    return replace(own, cu_seqlens=torch.tensor(edges, dtype=torch.int32))


def positions_from_the_slice(batch: PackedBatch, cut: Callable[[PackedBatch], PackedBatch]) -> PackedBatch:
    own = cut(batch)
    return replace(own, position_ids=own.position_ids - own.position_ids[:, :1].clamp(max=0) - first_run(own))


def first_run(own: PackedBatch) -> Tensor:
    """What a document that began in an earlier slice has to lose to start at 0 in this one."""
    continued = (own.position_ids.diff(dim=1, prepend=own.position_ids[:, :1] - 1) == 1).cumprod(dim=1)
    return continued * own.position_ids[:, :1]


def label_lost_at_the_edge(batch: PackedBatch, cut: Callable[[PackedBatch], PackedBatch]) -> PackedBatch:
    """As if labels had been shifted inside the slice."""
    own = cut(batch)
    labels, weights = own.labels.clone(), own.loss_weights.clone()
    labels[:, -1], weights[:, -1] = IGNORE_INDEX, 0.0
    return replace(own, labels=labels, loss_weights=weights, num_loss_tokens=int((labels != IGNORE_INDEX).sum()))


def heads_in_another_order(self: SequenceGroup, out: Tensor) -> Tensor:
    return TO_TOKENS(self, out).flip(2)


def gradient_not_sent_back(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
    return None, gradient


def gradients_of_one_rank(self: SequenceGroup, tensor: Tensor) -> Tensor:
    """The loss is summed, the gradients are not."""
    return TOTAL(self, tensor) if tensor.ndim == 0 else tensor.detach().clone()


def every_rank_the_first_sinks(self: SequenceGroup, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    attend = ACROSS(self, kernel)
    first = lambda sinks: sinks.flatten().roll(sinks.numel() // 2)  # noqa: E731
    return lambda *a, sinks, **k: attend(*a, sinks=None if sinks is None else first(sinks), **k)


TO_TOKENS, TOTAL, ACROSS = SequenceGroup._to_tokens, SequenceGroup.total, SequenceGroup._across_heads
CUT = SequenceGroup.cut
MUTATIONS: dict[str, tuple[str, Any, str, Any]] = {  # name -> (architecture, where, attribute, what is put there)
    f.__name__: ("llama", SequenceGroup, "cut", lambda self, batch, f=f: f(batch, partial(CUT, self)))
    for f in (edges_of_the_slice, positions_from_the_slice, label_lost_at_the_edge)
} | {
    "heads_in_another_order": ("llama", SequenceGroup, "_to_tokens", heads_in_another_order),
    "gradient_not_sent_back": ("llama", module._AllToAll, "backward", staticmethod(gradient_not_sent_back)),
    "gradients_of_one_rank": ("llama", SequenceGroup, "total", gradients_of_one_rank),
    "every_rank_the_first_sinks": ("gpt_oss", SequenceGroup, "_across_heads", every_rank_the_first_sinks),
}


@contextmanager
def broken(where: Any, attribute: str, replacement: Any) -> Iterator[None]:
    original = where.__dict__[attribute]
    setattr(where, attribute, replacement)
    try:
        yield
    finally:
        setattr(where, attribute, original)


def refusals(sequence: SequenceGroup) -> dict[str, str]:
    """Mutation -> what the certificate says about it; empty where it noticed nothing."""
    said = {}
    for name, (architecture, *change) in MUTATIONS.items():
        with broken(*change):
            try:
                prove(tiny_config(architecture), sequence)
                said[name] = ""
            except CertificateError as error:
                said[name] = str(error)
    return said


def find(place: Runtime, size: int, cases: list[str]) -> dict[str, Any]:
    """Everything about rows cut among `size` ranks."""
    sequence = sequence_group(size, place)
    found: dict[str, Any] = {"cases": {}}
    for case in cases:
        started = time.perf_counter()
        found["cases"][case] = run(case, place, sequence)
        if place.is_main:
            print(f"{size} {case}: {time.perf_counter() - started:.1f} s", flush=True)
    if place.world_size == size > 1:
        found["certificates"] = {name: prove(config, sequence) for name, config in architectures()}
        found["certificates"]["bfloat16"] = prove(tiny_config("llama"), sequence, torch.bfloat16)
        found["refusals"] = refusals(sequence)
        found["dispatched"] = dispatched(sequence)
    return found


def main(folder: Path, cases: list[str]) -> None:
    by_size: dict[int, list[str]] = {}
    for size, case in (case.split(":") for case in cases):
        by_size.setdefault(int(size), []).append(case)
    with runtime() as place:
        torch.set_num_threads(1)
        for size, mine in by_size.items():
            found = find(place, size, mine)
            if place.is_main:
                (folder / f"found-{place.world_size}-{size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
