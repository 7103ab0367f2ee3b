"""A word-level tokenizer for the skills, saved as a folder that `AutoTokenizer` loads.

Every word is one token, every digit one token, so that a model of half a million parameters spends nothing on
spelling. A token remembers whether a blank came before it, which makes decoding exact. The chat template wraps each
turn in its role's token and `<|end|>`, which is also the end of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer whose vocabulary is every word of `texts`, sorted, after the special tokens."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex("▁?[0-9]"), "isolated"),
            pre_tokenizers.Split(Regex("[.,:?+]"), "isolated"),
        ]
    )
    words = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Build the tokenizer of `texts` and write it to `folder`."""
    build_tokenizer(texts).save_pretrained(folder)
