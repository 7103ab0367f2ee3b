"""The token that begins every text (BOS), whoever writes it.

Some tokenizers put one before whatever they encode (Llama, Mistral, Gemma); some chat templates write it themselves;
some do neither. A model that met it before every text in pretraining should meet it in tuning and in use, once. So a
template that does not write what its tokenizer would add is made to: then training, and everybody who later renders the
exported template, see the same tokens. Texts without a template get the token's id, as stock tokenizers give it.

A template that does write it is left as it is: with white space in front, several times, or before some conversations
only. In the last case a row without it gets the id, which the template will not write in use: `bos_notices` says so.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from sft_dist.data.rendering import render
from sft_dist.data.template_engine import compile_template
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPENING = (
    "{% if bos_token %}{{ bos_token }}{% endif %}\n"  # the newline goes with the block, so the next line is a first one
)
PROBES = (("user",), ("user", "assistant"), ("system", "user", "assistant"))


def bos_of_texts(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The BOS token if this tokenizer puts one before every text. The flag `add_bos_token` does not tell: under
    transformers 5 it is False beside post-processors (of tokenizer.json) that add one."""
    bos_id = tokenizer.bos_token_id
    return tokenizer.bos_token if bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id] else None


def begins_with(text: str, bos: str) -> bool:
    """Whether a template wrote the token itself, behind white space at most."""
    return text.lstrip().startswith(bos)


def begin_with_bos(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja source `template`, made to begin with BOS when the tokenizer begins texts with it and no short
    conversation that the template accepts does."""
    bos = bos_of_texts(tokenizer)
    if bos is None:
        return template
    texts = _probe(template, tokenizer)
    return template if not texts or any(begins_with(text, bos) for text in texts) else OPENING + template


def bos_notices(template: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A line about a template that writes BOS, where it is wanted, before some short conversations and not others."""
    bos = bos_of_texts(tokenizer)
    if bos is None or len({begins_with(text, bos) for text in _probe(template, tokenizer)}) < 2:
        return []
    return [
        f"warning: data.chat_template begins only some conversations with BOS ({bos}); training rows of the others get "
        "one that the exported template does not write; make the template write it before all"
    ]


def _probe(template: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    texts, compiled = [], compile_template(template)
    for roles in PROBES:
        conversation = Conversation(tuple(Message(role, "a") for role in roles))
        with suppress(BadRecord):
            texts.append(render(compiled, conversation, special_tokens).text)
    return texts
