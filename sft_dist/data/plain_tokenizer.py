"""What preparing data asks of a tokenizer, apart from transformers.

    PlainTokenizer.of(tokenizer)      the same `tokenizers.Tokenizer`, and the few facts that its wrapper adds

A process that tokenises gets this one: reading it imports neither transformers nor torch, which take longer to start
than thousands of records to tokenise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sft_dist.data.bos import bos_of_texts
from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, eq=False)
class PlainTokenizer:
    """A tokenizer by what it does; two of them are equal when they are the same object."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    size: int  # tokens, added ones included
    special_tokens: dict[str, str]  # name -> text, as templates know them
    special_texts: tuple[str, ...]  # of all added tokens that are special
    bos_of_texts: str | None  # the token that it puts before every text
    bos_token_id: int | None
    splits_special_tokens: bool  # reads the texts of special tokens as any other text

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast | PlainTokenizer) -> PlainTokenizer:
        """The plain tokenizer under a wrapper. Raises ConfigError where there is none."""
        if isinstance(tokenizer, PlainTokenizer):
            return tokenizer
        if not tokenizer.is_fast:
            raise ConfigError("model.tokenizer: a fast tokenizer (tokenizer.json) is needed to place the loss mask")
        named = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        return cls(
            backend_tokenizer=tokenizer.backend_tokenizer,
            size=len(tokenizer),
            special_tokens=named,
            special_texts=tuple(one.content for one in tokenizer.added_tokens_decoder.values() if one.special),
            bos_of_texts=bos_of_texts(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            splits_special_tokens=tokenizer.split_special_tokens,
        )

    def __post_init__(self) -> None:
        self.backend_tokenizer.encode_special_tokens = self.splits_special_tokens  # wrappers set it with each call

    def __len__(self) -> int:
        return self.size

    @property
    def eos_token(self) -> str:
        """The end token's text; empty where there is none."""
        return self.special_tokens.get("eos_token", "")

    @property
    def unknown_id(self) -> int | None:
        """The token that is written for what the vocabulary cannot spell; None where nothing, or no token of its own,
        is.

        The model inside says which. The wrapper's `unk_token` may be a mere name: GPT-2's is its end token, which no
        text becomes. Unigram models do not tell theirs, which is that token.
        """
        model, named = self.backend_tokenizer.model, self.special_tokens.get("unk_token")
        name = getattr(model, "unk_token", None) if hasattr(model, "unk_token") else named
        found: int | None = self.backend_tokenizer.token_to_id(name) if name else None
        ends = self.backend_tokenizer.token_to_id(self.eos_token) if self.eos_token else None
        return None if found in (ends, self.bos_token_id) else found

    def encode(self, text: str) -> list[int]:
        """Its token ids, without those that begin or end every text."""
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def __getstate__(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def __setstate__(self, state: list[Any]) -> None:
        for field, value in zip(fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)
        self.__post_init__()
