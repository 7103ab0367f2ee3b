"""The certificate: a proof on this model, this attention kernel and this batch layout that packing changes nothing.

    layout        what collate built: positions restart, labels stay inside documents, the mask is the one asked for
    boundaries    changing other documents does not move a document's hidden states          (the real model)
    alone         a document packed among others has the hidden states it has alone          (the real model)
    loss          packed loss equals the documents one by one through stock transformers     (2-layer float32 copy)
    gradients     so does every gradient tensor                                              (2-layer float32 copy)

A check that fails refuses the run and names the way out. Takes seconds; runs at every start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from sft_dist.data.collate import collate
from sft_dist.errors import CertificateError
from sft_dist.models import attention
from sft_dist.models.packed import Head, PackedCausalLM
from sft_dist.parallel.sequence import ALONE, SequenceGroup, random_rates
from sft_dist.types import IGNORE_INDEX, Pack, PackedBatch, TokenizedExample

LENGTHS = (5, 1, 17, 40, 2, 9)  # uneven, with one-token and two-token documents; 40 exceeds COPY_WINDOW
COPY_WINDOW = 16
PAD_MULTIPLE = 8
TOLERANCE_HIDDEN = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # of the hidden states' largest value
TOLERANCE_LOSS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # relative
TOLERANCE_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # norm of difference over norm
COPY_VOCABULARY = 512

WAY_OUT = {
    "best_fit": "set data.packing=padded",
    "none": "set data.packing=padded",
    "padded": "this architecture cannot be fine-tuned safely here",
}

Collate = Callable[..., PackedBatch]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the certificate: what was compared, the figure found, the largest allowed."""

    name: str
    figure: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit


@dataclass(frozen=True, slots=True)
class Documents:
    """Probe documents in memory, with the two methods of a token store that collate reads."""

    examples: tuple[TokenizedExample, ...]

    def loss_weights(self, index: int) -> np.ndarray:
        return self.examples[index].loss_weights

    def token_ids(self, index: int) -> np.ndarray:
        return self.examples[index].input_ids

    @property
    def packs(self) -> tuple[Pack, ...]:
        """One document each, in order; weights are 0/1, so counts and sums agree."""
        counts = [int((example.loss_weights[1:] > 0).sum()) for example in self.examples]
        sizes = [len(example.input_ids) for example in self.examples]
        return tuple(Pack((i,), n, c, float(c), float(n)) for i, (n, c) in enumerate(zip(sizes, counts, strict=True)))


def certify(
    hidden_states: Callable[[PackedBatch], Tensor],
    config: PretrainedConfig,
    *,
    head: Head,
    backend: str | None,
    packing: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    make_batch: Collate = collate,
    sequence: SequenceGroup = ALONE,
) -> list[Check]:
    """Run all checks; raise CertificateError naming the first that fails.

    `hidden_states` is the real model's, on every rank at once when it is sharded. `backend` is the attention kernel, or
    None for padded batches, which keep the architecture's own attention. All ranks of a `sequence` group call together:
    every batch is cut between them, and what they find is joined before it is compared.
    """
    build = Builder(make_batch, packing, sequence.pad_multiple(PAD_MULTIPLE))
    vocabulary = min(config.get_text_config().vocab_size, COPY_VOCABULARY)
    documents = probe_documents(vocabulary, seed)
    first = "set parallel.sequence=1; where that is refused too, " if sequence.size > 1 else ""
    way_out = first + WAY_OUT[packing]
    checks = [check_layout(build, documents)]
    try:
        whole_hidden_states = lambda batch: sequence.join(hidden_states(sequence.cut(batch)))  # noqa: E731
        checks += check_hidden_states(build, documents, whole_hidden_states, vocabulary, device, dtype)
        checks += check_copy(
            build, documents, config, head=head, backend=backend, device=device, seed=seed, sequence=sequence
        )
    except (
        TypeError,
        ValueError,
    ) as error:  # a forward that does not take positions or segments, or refuses packing itself
        cause = str(error).strip().splitlines()[0]
        raise CertificateError(
            f"certificate: {config.model_type} cannot take packed rows ({cause}); {way_out}"
        ) from error
    for check in checks:
        if not check.passed:
            raise CertificateError(refusal(check, config, backend, packing, way_out))
    return checks


def refusal(check: Check, config: PretrainedConfig, backend: str | None, packing: str, way_out: str) -> str:
    """What failed, by how much, and the way out."""
    kernel = f"attention {backend}" if backend else "its own attention"
    return (
        f"certificate: {check.name} differ by {check.figure:.1e} (allowed {check.limit:.0e}) for {config.model_type} "
        f"with {kernel}, data.packing={packing}: documents would see each other or the loss would be wrong; "
        f"{way_out}"
    )


@dataclass(frozen=True, slots=True)
class Builder:
    """Turns probe documents into a batch with the run's own collate."""

    make_batch: Collate
    packing: str
    pad_to_multiple_of: int = PAD_MULTIPLE

    def __call__(self, documents: Documents) -> PackedBatch:
        packs: Sequence[Pack] = documents.packs
        if self.packing == "best_fit":  # all documents in one pack
            packs = [merge(packs)]
        multiple = self.pad_to_multiple_of
        return self.make_batch(packs, documents, packing=self.packing, pad_token_id=0, pad_to_multiple_of=multiple)


def merge(packs: Sequence[Pack]) -> Pack:
    """One pack that holds the documents of all."""
    return Pack(
        example_ids=tuple(i for pack in packs for i in pack.example_ids),
        num_tokens=sum(pack.num_tokens for pack in packs),
        num_loss_tokens=sum(pack.num_loss_tokens for pack in packs),
        loss_weight_sum=sum(pack.loss_weight_sum for pack in packs),
        cost=sum(pack.cost for pack in packs),
    )


def probe_documents(vocabulary: int, seed: int) -> Documents:
    """Random tokens; each document's first third is context, the rest supervised."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in LENGTHS:
        weights = np.zeros(length, dtype=np.float32)
        weights[length // 3 :] = 1.0
        examples.append(TokenizedExample(rng.integers(0, vocabulary, length, dtype=np.int32), weights))
    return Documents(tuple(examples))


def altered(documents: Documents, keep: int, vocabulary: int) -> Documents:
    """The same lengths with every token changed, except in documents whose index has the parity of `keep`."""
    changed = [
        example
        if index % 2 == keep
        else TokenizedExample((example.input_ids + 1 + index) % vocabulary, example.loss_weights)
        for index, example in enumerate(documents.examples)
    ]
    return Documents(tuple(changed))


def check_layout(build: Builder, documents: Documents) -> Check:
    """Count positions where the batch differs from what each document alone says it must be."""
    batch, wrong = build(documents), 0
    for index, where in enumerate(locate(batch, documents)):
        example = documents.examples[index]
        target = np.append(example.input_ids[1:].astype(np.int64), IGNORE_INDEX)
        weight = np.append(example.loss_weights[1:], 0.0)
        wrong += int((batch.input_ids[where].numpy() != example.input_ids).sum())
        wrong += int((batch.position_ids[where].numpy() != np.arange(len(target))).sum())
        wrong += int((batch.labels[where].numpy() != np.where(weight > 0, target, IGNORE_INDEX)).sum())
        wrong += int((batch.loss_weights[where].numpy() != weight).sum())
    expected = sum(pack.num_loss_tokens for pack in documents.packs)
    wrong += abs(int((batch.labels != IGNORE_INDEX).sum()) - expected) + abs(batch.num_loss_tokens - expected)
    return Check("layout: positions, labels or weights", float(wrong), 0.0)


def check_hidden_states(
    build: Builder,
    documents: Documents,
    hidden_states: Callable[[PackedBatch], Tensor],
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Check]:
    """The two probes of the real model: other documents changed, and each document alone."""
    batch = build(documents)
    places = locate(batch, documents)
    base = hidden_states(batch.to(device)).float()
    scale = max(base.abs().max().item(), 1e-6)
    moved = 0.0
    for keep in (0, 1):
        other = hidden_states(build(altered(documents, keep, vocabulary)).to(device)).float()
        moved = max([moved] + [(other[p] - base[p]).abs().max().item() for p in places[keep::2]])
    apart = 0.0
    for example, place in zip(documents.examples, places, strict=True):
        single = build(Documents((example,)))
        (where,) = locate(single, Documents((example,)))
        apart = max(apart, (hidden_states(single.to(device)).float()[where] - base[place]).abs().max().item())
    limit = TOLERANCE_HIDDEN[dtype]
    return [
        Check("boundaries: hidden states with other documents changed", moved / scale, limit),
        Check("alone: hidden states packed and alone", apart / scale, limit),
    ]


@torch.enable_grad()
def check_copy(
    build: Builder,
    documents: Documents,
    config: PretrainedConfig,
    *,
    head: Head,
    backend: str | None,
    device: torch.device,
    seed: int,
    sequence: SequenceGroup,
) -> list[Check]:
    """Packed loss and gradients of a small copy against stock transformers, one document at a time.

    The kernels that know no float32 are compared in bfloat16, and the architecture itself with the float32 reference
    kernel beside them: a leak outside attention (a convolution, a state) is too small to see in bfloat16.
    """
    if backend in (None, "sdpa", "flex"):
        return _compare_copy(build, documents, config, head, backend, device, seed, sequence, torch.float32)
    reference = _compare_copy(build, documents, config, head, "sdpa", device, seed, sequence, torch.float32)
    return reference + _compare_copy(build, documents, config, head, backend, device, seed, sequence, torch.bfloat16)


def _compare_copy(
    build: Builder,
    documents: Documents,
    config: PretrainedConfig,
    head: Head,
    backend: str | None,
    device: torch.device,
    seed: int,
    sequence: SequenceGroup,
    dtype: torch.dtype,
) -> list[Check]:
    stock = small_copy(config, seed).to(device)
    ours = copy.deepcopy(stock)
    if backend is not None:
        attention.install(ours, backend, sequence.across)
    packed = PackedCausalLM(ours, head, autocast_dtype=None if dtype == torch.float32 else dtype)
    own_loss = packed(sequence.cut(build(documents)).to(device))
    own_loss.backward()
    loss = sequence.total(own_loss)
    reference = torch.stack([stock_loss(stock, example, device) for example in documents.examples]).sum()
    reference.backward()
    difference = abs(loss.item() - reference.item()) / abs(reference.item())
    precision = str(dtype).removeprefix("torch.")
    return [
        Check(f"loss: {precision} loss packed and one by one", difference, TOLERANCE_LOSS[dtype]),
        Check(
            f"gradients: {precision} gradients packed and one by one",
            gradient_distance(ours, stock, sequence),
            TOLERANCE_GRADIENT[dtype],
        ),
    ]


def stock_loss(model: nn.Module, example: TokenizedExample, device: torch.device) -> Tensor:
    """The textbook loss of one document: full logits, shifted, weighted, summed. fp32 scalar."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64)).to(device)[None]
    weights = torch.from_numpy(example.loss_weights[1:]).to(device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return (F.cross_entropy(logits, ids[0, 1:], reduction="none") * weights).sum()


def gradient_distance(ours: nn.Module, stock: nn.Module, sequence: SequenceGroup) -> float:
    """Largest |g - g_ref| / |g_ref| over parameters; gradients that are zero count against 1e-3 of the typical norm."""
    both = zip(ours.parameters(), stock.parameters(), strict=True)
    pairs = [(sequence.total(zero_if_none(a)), zero_if_none(b)) for a, b in both]
    floor = 1e-3 * float(np.median([b.norm().item() for _, b in pairs]))
    return max((a - b).norm().item() / max(b.norm().item(), floor, 1e-12) for a, b in pairs)


def zero_if_none(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def small_copy(config: PretrainedConfig, seed: int) -> nn.Module:
    """The architecture with 2 layers (one of each kind), a small vocabulary, a short window, random float32 weights."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    _shorten(text)
    text.vocab_size = min(text.vocab_size, COPY_VOCABULARY)
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, COPY_WINDOW)
    for name in random_rates(text):
        setattr(text, name, 0.0)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) >= text.vocab_size:
            setattr(text, name, None)
    small._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    return model.train()


def _shorten(text: PretrainedConfig) -> None:
    """Two layers, or one of each kind where layers differ; architectures that derive their kinds keep their order."""
    kinds = list(getattr(text, "layer_types", None) or [])
    distinct = sorted(set(kinds), key=kinds.index)
    text.num_hidden_layers = max(2, len(distinct))
    if kinds and isinstance(getattr(type(text), "layer_types", None), property):
        return
    if kinds:
        text.layer_types = (distinct * 2)[: text.num_hidden_layers]


def locate(batch: PackedBatch, documents: Documents) -> list[Any]:
    """For each document the index of its tokens in a batch tensor: [0, a:b] packed, [row, :length] padded."""
    if batch.cu_seqlens is None:
        return [(row, slice(0, len(example.input_ids))) for row, example in enumerate(documents.examples)]
    edges = batch.cu_seqlens.tolist()
    return [(0, slice(edges[i], edges[i + 1])) for i in range(len(documents.examples))]
