"""A finished model on a recipe's held-out data, in one process and without a process group.

The split is the recipe's, tokenised for the model that is measured. Documents are padded, not packed, and attention is
the architecture's own: so the loss needs no certificate, and is the one that packed training reports up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sft_dist.config.schema import ModelSection, Recipe
from sft_dist.data.loader import Loader
from sft_dist.data.plan import eval_plan
from sft_dist.data.prepare import PreparedData, prepare
from sft_dist.data.store import TokenStore
from sft_dist.errors import ConfigError
from sft_dist.evaluate.generation import generate, prompts_from_store
from sft_dist.evaluate.metrics import exact_match
from sft_dist.models.packed import PackedCausalLM, causal_lm, pick_head
from sft_dist.models.speaker import Speaker

MICRO_BATCH_TOKENS = 4_096
PAD_MULTIPLE = 8
GENERATION_BATCH = 32


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a model reaches on one split. `exact_match` is a share of `num_checked`, None when none was checked."""

    split: str
    num_examples: int
    eval_loss: float  # nats per supervised token, weighted as in training
    num_loss_tokens: int
    exact_match: float | None
    num_checked: int


def measure(speaker: Speaker, path: str, recipe: Recipe, num: int, notice: Callable[[str], None]) -> Measurement:
    """Loss over the whole test split (else the eval split), and exact answers to `num` of its prompts.

    `path` is where `speaker` came from. The prompts are those that a run of the recipe asks. Raises ConfigError when
    the recipe holds nothing out, and what preparing the data raises.
    """
    data = prepare(
        recipe.model_copy(update={"model": ModelSection(path=path)}),
        speaker.tokenizer,
        notice=notice,
    )
    split, store = _held_out(data)
    loss, num_loss_tokens = padded_loss(speaker, store, recipe)
    matches = _matches(speaker, data, store, recipe, num)
    share = sum(matches) / len(matches) if matches else None
    return Measurement(split, len(store), loss, num_loss_tokens, share, len(matches))


@torch.no_grad()
def padded_loss(speaker: Speaker, store: TokenStore, recipe: Recipe) -> tuple[float, int]:
    """(loss per supervised token, number of supervised tokens) over the whole store."""
    lm = causal_lm(speaker.model)
    device = lm.get_input_embeddings().weight.device
    packed = PackedCausalLM(speaker.model, pick_head(recipe.kernels.head, device)[1]).eval()
    seq_len = recipe.data.seq_len
    plan = eval_plan(
        lengths=store.lengths,
        num_loss_tokens=store.num_loss_tokens,
        loss_weight_sums=store.loss_weight_sums,
        seq_len=seq_len,
        packing="padded",
        packs_per_micro_batch=max(1, MICRO_BATCH_TOKENS // seq_len),
        store_fingerprint=store.fingerprint,
    )
    loader = Loader(
        store,
        plan,
        rank=0,
        world_size=1,
        packing="padded",
        pad_token_id=_pad_token_id(speaker),
        pad_to_multiple_of=PAD_MULTIPLE,
        device=device,
    )
    total, divisor, num_loss_tokens = torch.zeros((), dtype=torch.float64, device=device), 0.0, 0
    try:
        for number in range(1, plan.num_steps + 1):
            loaded = loader.step(number)
            divisor += loaded.step.loss_weight_sum
            num_loss_tokens += loaded.step.num_loss_tokens
            for batch in loaded.batches:
                total += packed(batch.to(device)).double()
    finally:
        loader.close()
    return total.item() / divisor, num_loss_tokens


def _held_out(data: PreparedData) -> tuple[str, TokenStore]:
    for name, store in (("test", data.test), ("eval", data.eval)):
        if store is not None:
            return name, store
    raise ConfigError(
        "data.test_fraction and data.eval_fraction leave nothing held out: set one, or name data.test_sources"
    )


def _matches(speaker: Speaker, data: PreparedData, store: TokenStore, recipe: Recipe, num: int) -> list[bool]:
    """For each of `num` prompts, whether the greedy answer is the reference."""
    tokenizer = speaker.tokenizer
    prompts = prompts_from_store(store, tokenizer, num, recipe.run.seed, data.template.stop_strings(tokenizer))
    answers = generate(
        speaker.model,
        tokenizer,
        prompts,
        max_new_tokens=recipe.eval.max_new_tokens,
        stop_token_ids=data.template.stop_token_ids(tokenizer),
        stop_strings=data.template.stop_strings(tokenizer),
        batch_size=GENERATION_BATCH,
        synced=False,
    )
    return [exact_match(answer, prompt.reference) for answer, prompt in zip(answers, prompts, strict=True)]


def _pad_token_id(speaker: Speaker) -> int:
    """Any id does: padding is masked and carries no label."""
    tokenizer = speaker.tokenizer
    return next(int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
