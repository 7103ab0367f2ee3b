"""The layout certificate: one optimizer step under this engine and mesh is the step that one process would take.

    loss           of the global batch, as every rank reports it
    gradient norm  likewise, before clipping, which is on
    direction      1 - cosine of each tensor's update
    length         of each tensor's update, relative
    ranks          of each tensor after the step, as every rank holds it

It runs at every start, and alone with `sft-dist certify RECIPE --layout`. To be affordable for any model it does not
touch the run's own: a **copy of reduced depth** (two layers, or one of each kind; 512 words; MLPs at most 1,024 wide;
attention as wide as it is) goes through the same `spread`, the same engine and mesh and the loop's own step. What that
cannot see is what only the full depth or width would show. The reference is plain PyTorch on one process, rank 0, and
shares neither engine nor loop with what it judges.

AdamW forgets the scale of gradients (a sum and a mean give the same update). Here its epsilon is 1, so that the update
is nearly proportional to the gradient, and clipping halves the gradient: a wrong scale or clip shows as a wrong length
and direction.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.assembly import spread
from sft_dist.certify import COPY_VOCABULARY, PAD_MULTIPLE, Check, Documents, merge, small_copy
from sft_dist.config.auto import Choices
from sft_dist.config.schema import OptimSection, Recipe
from sft_dist.data.collate import collate
from sft_dist.data.loader import LoadedStep
from sft_dist.errors import CertificateError
from sft_dist.models.load import DTYPES
from sft_dist.models.packed import PackedCausalLM
from sft_dist.network import Network, base_dtype, tune
from sft_dist.optim import build_optimizer
from sft_dist.parallel.engine import Engine, full_tensor, trained_parameters
from sft_dist.parallel.messages import broadcast_json, gather_json
from sft_dist.parallel.runtime import Runtime, seed_for
from sft_dist.parallel.sequence import ALONE, SequenceGroup
from sft_dist.types import Pack, PackedBatch, StepPlan, TokenizedExample

WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
MAX_WIDTH = 1024
PROBE = OptimSection(eps=1.0, weight_decay=0.0)  # an update proportional to the gradient
LR = 10.0  # large, so that what is subtracted from the weights is not lost in their rounding
CLIP_SHARE = 0.5  # of the reference's gradient norm: clipping must be on to be seen
DOCUMENTS_AT_ONCE = 32  # of the reference
# loss, gradient norm, direction, length, ranks: of figures relative to the reference
TOLERANCES = {
    torch.float32: (1e-6, 1e-5, 1e-6, 1e-4, 0.0),
    torch.bfloat16: (1e-2, 3e-2, 1e-2, 5e-2, 0.0),
}
FLOOR = 1e-3  # of the median update: shorter ones are rounding

Step = Callable[..., Any]  # sft_dist.train.train_step, which this module stands below


@dataclass(frozen=True, slots=True)
class Truth:
    """What one process finds: figures on every rank, tensors on rank 0 only."""

    loss: float
    grad_norm: float
    updates: dict[str, Tensor]  # name -> after the step minus before, fp32 on the CPU


def certify_layout(
    recipe: Recipe,
    choices: Choices,
    config: Any,
    place: Runtime,
    step: Step,
    *,
    pad_token_id: int = 0,
    sequence: SequenceGroup = ALONE,
) -> list[Check]:
    """Run it on all ranks; raise CertificateError, on all alike, naming the first figure that is too large.

    `config` is the run's architecture, `step` the loop's own step, `sequence` the ranks that share rows. Leaves model,
    optimizer and random numbers alone.
    """
    compute, probing = DTYPES[choices.compute], probe_recipe(recipe)
    with _random_numbers_kept(place):
        documents = probe_documents(config, place.world_size // sequence.size)
        truth = None
        if place.is_main:  # before the attention of a sequence group takes the place of that of whole rows
            truth = reference(reduced(probing, config, compute, place, ALONE), documents, place)
        loss, grad_norm = broadcast_json((truth.loss, truth.grad_norm) if truth else None)
        network = reduced(probing, config, compute, place, sequence)
        loaded = global_batch(documents, recipe, place, sequence, pad_token_id)
        figures = measure(network, probing, choices, place, step, loaded, truth, loss, grad_norm)
    gc.collect()  # a wrapper that outlives the process group would hang its end
    if place.device.type == "cuda":  # the run's peak is its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    checks = judge(figures, compute)
    for check in checks:
        if not check.passed:
            raise CertificateError(refusal(check, recipe, choices, place))
    return checks


def judge(figures: list[float], compute: torch.dtype) -> list[Check]:
    """The checks of the worst rank's figures; what is not a number fails."""
    names = ("loss: of one step", "gradient norm", "direction: of updates", "length: of updates", "ranks: unequal")
    sizes = [abs(figure) if math.isfinite(figure) else math.inf for figure in figures]
    worst = map(max, *gather_json(sizes)) if dist.get_world_size() > 1 else sizes
    return [Check(*line) for line in zip(names, worst, TOLERANCES[compute], strict=True)]


def refusal(check: Check, recipe: Recipe, choices: Choices, place: Runtime) -> str:
    """What failed, by how much, and the way out."""
    mesh = f" as {recipe.parallel.dp_replicate} replicas" if recipe.parallel.dp_replicate > 1 else ""
    return (
        f"layout certificate: {check.name} differs by {check.figure:.1e} (allowed {check.limit:.0e}) between "
        f"{choices.strategy} on {place.world_size} process(es){mesh} and one process: training would not be what the "
        f"recipe says; set parallel.strategy to another engine, and report this"
    )


def probe_recipe(recipe: Recipe) -> Recipe:
    """The run's recipe with an update proportional to the gradient, fp32 masters, and without what is drawn for whole
    batches (dropout, noise)."""
    tuning = recipe.tuning.model_copy(update={"dropout": 0.0})
    precision = recipe.precision.model_copy(update={"master": "float32", "stochastic_rounding": False})
    return recipe.model_copy(update={"tuning": tuning, "precision": precision, "optim": PROBE})


def reduced(recipe: Recipe, config: Any, compute: torch.dtype, place: Runtime, sequence: SequenceGroup) -> Network:
    """The copy, tuned as the run is."""
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config()
    for name in WIDTHS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), MAX_WIDTH))
    model = small_copy(narrow, recipe.run.seed).to(base_dtype(recipe, compute))
    model.config.use_cache = False  # type: ignore[union-attr]
    network = tune(model, recipe, compute, place.device, sequence)
    for name, parameter in trained_parameters(PackedCausalLM(network.model, network.head)).items():
        if not parameter.detach().any():  # LoRA's B: nothing would flow to A
            generator = torch.Generator().manual_seed(seed_for(recipe.run.seed, name))
            parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return network


def probe_documents(config: Any, world_size: int) -> Documents:
    """Two for each of 3/2 micro-batches a rank: sums of unlike sizes, and ranks that have none in the last round."""
    rng = np.random.default_rng(0)
    vocabulary = min(config.get_text_config().vocab_size, COPY_VOCABULARY)
    examples = []
    for length in rng.integers(3, 40, 2 * (world_size + (world_size + 1) // 2)):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[-1] = 1.0
        examples.append(TokenizedExample(rng.integers(0, vocabulary, length, dtype=np.int32), weights))
    return Documents(tuple(examples))


def global_batch(
    documents: Documents, recipe: Recipe, place: Runtime, sequence: SequenceGroup, pad_token_id: int
) -> LoadedStep:
    """This rank's part, dealt as the loader deals: group g of G takes micro-batches g, G + g, ... and cuts them."""
    packs = documents.packs
    cuts = [packs[i : i + 2] for i in range(0, len(packs), 2)]
    group, groups = place.rank // sequence.size, place.world_size // sequence.size
    mine = tuple(round_ * groups + group for round_ in range(-(-len(cuts) // groups)))
    multiple = sequence.pad_multiple(PAD_MULTIPLE)
    build = partial(_collate, documents, recipe.data.packing, pad_token_id, multiple)
    batches = tuple(sequence.cut(build(cuts[i] if i < len(cuts) else ())) for i in mine)
    return LoadedStep(StepPlan(1, 0, tuple(map(tuple, cuts))), batches, mine, "")


def reference(network: Network, documents: Documents, place: Runtime) -> Truth:
    """One process, no engine, no loop: the sum over all documents divided once, clipped, one AdamW step."""
    model = network.model.to(place.device)
    autocast = None if network.compute == torch.float32 else network.compute
    packed = PackedCausalLM(model, network.head, autocast_dtype=autocast).train()
    trained = trained_parameters(packed)
    before = {name: p.detach().float().cpu().clone() for name, p in trained.items()}
    packs = documents.packs
    divisor, total = sum(pack.loss_weight_sum for pack in packs), 0.0
    packing = "best_fit" if network.backend else "padded"
    for i in range(0, len(packs), DOCUMENTS_AT_ONCE):
        batch = _collate(documents, packing, 0, PAD_MULTIPLE, packs[i : i + DOCUMENTS_AT_ONCE])
        loss_sum = packed(batch.to(place.device))
        (loss_sum / divisor).backward()
        total += loss_sum.item()
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    norm = torch.stack([g.double().norm() for g in gradients]).norm().item()
    for gradient in gradients:
        gradient.mul_(CLIP_SHARE)  # to at most half of the norm: exactly this factor
    build_optimizer(trained, PROBE, LR).step()
    return Truth(total / divisor, norm, {name: p.detach().float().cpu() - before[name] for name, p in trained.items()})


def measure(
    network: Network,
    recipe: Recipe,
    choices: Choices,
    place: Runtime,
    step: Step,
    loaded: LoadedStep,
    truth: Truth | None,
    loss: float,
    grad_norm: float,
) -> list[float]:
    """This rank's five figures, relative to the reference."""
    engine = spread(network, recipe, replace(choices, lr=LR), place)
    before = {name: full_tensor(tensor).float().cpu().clone() for name, tensor in _weights(engine).items()}
    found = step(
        engine, loaded, lr=LR, max_norm=CLIP_SHARE * grad_norm, seed=recipe.run.seed, device=place.device, stop=False
    )
    direction, length, apart = compare(engine, before, truth)
    return [found.loss / loss - 1, found.grad_norm / grad_norm - 1, direction, length, apart]


def compare(engine: Engine, before: dict[str, Tensor], truth: Truth | None) -> tuple[float, float, float]:
    """(largest 1 - cosine, largest relative difference in length) over updates, and whether ranks hold other tensors
    than rank 0 (1.0) or the same (0.0). The reference travels from rank 0 one tensor at a time."""
    lengths = broadcast_json({n: u.norm().item() for n, u in truth.updates.items()} if truth else None)
    floor = FLOOR * float(np.median(list(lengths.values())))
    direction, length, apart = 0.0, 0.0, 0.0
    for name, tensor in _weights(engine).items():
        after = full_tensor(tensor).float().cpu()
        first = after.clone()
        dist.broadcast(first, src=0)
        apart = max(apart, float(not torch.equal(first, after)))
        wanted = truth.updates[name] if truth else torch.empty_like(after)
        dist.broadcast(wanted, src=0)
        update = (after - before[name]).double()
        norm, norm_wanted = update.norm().item(), lengths[name]
        length = max(length, abs(norm - norm_wanted) / max(norm_wanted, floor))
        if norm_wanted > floor:
            cosine = (update * wanted.double()).sum().item() / max(norm * norm_wanted, 1e-300)
            direction = max(direction, 1 - cosine)
    return direction, length, apart


def _weights(engine: Engine) -> dict[str, Tensor]:
    state = engine.state()
    return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}


def _collate(
    documents: Documents, packing: str, pad_token_id: int, multiple: int, packs: tuple[Pack, ...]
) -> PackedBatch:
    if packing == "best_fit" and packs:
        packs = (merge(packs),)
    return collate(packs, documents, packing=packing, pad_token_id=pad_token_id, pad_to_multiple_of=multiple)


@contextmanager
def _random_numbers_kept(place: Runtime) -> Iterator[None]:
    with torch.random.fork_rng(devices=[place.device] if place.device.type == "cuda" else []):
        yield
