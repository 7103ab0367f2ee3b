"""Greedy answers to held-out prompts.

Prompts are cut from the token store itself (everything before the last learned answer), so the model is asked in
exactly the tokens it was trained on, whatever the template. The answer ends at the template's stop token or stop text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sft_dist.data.stream_store import AnyStore
from sft_dist.data.templates import spans
from sft_dist.evaluate.stopping import stopping_criteria
from sft_dist.models.packed import carries_virtual_tokens, causal_lm


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question and the answer that the data gives."""

    ids: list[int]
    reference: str  # without the stop token
    id: str  # file:line of the record
    text: str  # the prompt, decoded


def prompts_from_store(
    store: AnyStore, tokenizer: PreTrainedTokenizerBase, num: int, seed: int, stop_strings: Sequence[str] = ()
) -> list[Prompt]:
    """At most `num` prompts, the same choice for the same (store, seed), in store order.

    `stop_strings` end a reference as they end an answer: a stop text of several tokens is supervised too.
    """
    chosen = np.random.default_rng(seed).permutation(len(store))[:num]
    return [_prompt(store, tokenizer, int(index), stop_strings) for index in np.sort(chosen)]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    stop_strings: Sequence[str],
    batch_size: int,
    synced: bool,
) -> list[str]:
    """One greedy answer per prompt, in order, without stop token or stop text.

    `model` has `.generate` and, inside, the Hugging Face model (a PackedCausalLM, or that model itself). `synced` keeps
    sharded ranks generating until the last one is done. Draws no random number.
    """
    lm = causal_lm(model.model if hasattr(model, "hidden_states") else model)  # type: ignore[arg-type]
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *stop_token_ids) if i is not None)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    if carries_virtual_tokens(model):
        batch_size = 1  # padding on the left would stand between them and the question
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # like lengths waste little padding
    with stock_attention(lm):
        device = lm.get_input_embeddings().weight.device
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _left_padded([prompts[index].ids for index in chosen], pad_id)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                synced_gpus=synced,
                stopping_criteria=stopping_criteria(tokenizer, stop_strings, ids.shape[1]),
            )
            for index, row in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[index] = _cut(row, tokenizer, stop_token_ids, stop_strings)
    return answers


@contextmanager
def stock_attention(lm: nn.Module) -> Iterator[None]:
    """The architecture's own attention and cache while generating: our segment attention knows neither."""
    config = lm.config.get_text_config()  # type: ignore[union-attr,operator]
    trained_with, used_cache = lm.config._attn_implementation, config.use_cache  # type: ignore[union-attr]
    stock = "eager" if getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss" else "sdpa"
    if trained_with not in ("eager", "sdpa"):
        lm.set_attn_implementation(stock)  # type: ignore[operator]
    config.use_cache = True
    try:
        yield
    finally:
        if trained_with not in ("eager", "sdpa"):
            lm.set_attn_implementation(trained_with)  # type: ignore[operator]
        config.use_cache = used_cache


def _prompt(store: AnyStore, tokenizer: PreTrainedTokenizerBase, index: int, stop_strings: Sequence[str]) -> Prompt:
    example = store.example(index)
    start, end = example.answers[-1] if example.answers else spans(example.loss_weights)[-1]
    ids = example.input_ids.tolist()
    return Prompt(
        ids=ids[:start] or ids[:1],  # a document trained from its first token is continued from that token
        reference=_cut(ids[start:end], tokenizer, (), stop_strings),
        id=example.id,
        text=tokenizer.decode(ids[:start]),
    )


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids and mask, [B, longest]; padding on the left, where generation does not continue."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _cut(
    row: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], stop_strings: Sequence[str]
) -> str:
    """The text before the first stop."""
    ends = [position for position, token in enumerate(row) if token in set(stop_ids)]
    text = tokenizer.decode(row[: ends[0]] if ends else row, skip_special_tokens=True)
    for stop in stop_strings:
        text = text.split(stop)[0]
    return text.strip()
