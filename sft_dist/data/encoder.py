"""Texts to token ids, and the tokens that each span of characters is in.

Two libraries do it, with the same result: `tokenizers`, which knows every tokenizer and the characters of each token,
and for byte-level BPE tiktoken, whose tokens say by their bytes where they stand (`byte_bpe`). The second takes a
second to set up, so it begins when the first has worked about as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sft_dist.data.byte_bpe import ByteBpe, byte_bpe_of
from sft_dist.data.plain_tokenizer import PlainTokenizer
from sft_dist.data.supervision import Span
from sft_dist.data.token_masks import token_ranges
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WORTH = 20  # characters for each token of the vocabulary: from then on a second library pays


class Encoded(NamedTuple):
    """One text: `ids` int32[L], and the tokens [first, end) that cover at least one character of each span."""

    ids: np.ndarray
    ranges: list[tuple[int, int]]


class Encoder:
    """One tokenizer at work."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | PlainTokenizer) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._fast: ByteBpe | None = None
        self._until_fast = _WORTH * len(tokenizer)
        self._num_batches = 0

    def expect_many(self) -> None:
        """Set up the second library now."""
        self._until_fast, self._fast = 0, byte_bpe_of(self._backend)

    def encode(self, texts: Sequence[str], masks: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Each text with its spans. Native: another thread can go on meanwhile.

        Raises DataError when the two libraries do not agree on a text.
        """
        if self._until_fast > 0:
            self._until_fast -= sum(map(len, texts))
            if self._until_fast <= 0:
                self.expect_many()
        if self._fast is None or not texts:
            return self._slowly(texts, masks)
        return self._quickly(self._fast, texts, masks)

    def _slowly(self, texts: Sequence[str], masks: Sequence[Sequence[Span]]) -> list[Encoded]:
        """With `tokenizers`. The wrapper of transformers would copy each encoding into lists, at the same cost."""
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.asarray(encoding.ids, np.int32), token_ranges(encoding, len(text), spans))
            for text, spans, encoding in zip(texts, masks, encodings, strict=True)
        ]

    def _quickly(self, fast: ByteBpe, texts: Sequence[str], masks: Sequence[Sequence[Span]]) -> list[Encoded]:
        """With tiktoken what it knows, the rest with `tokenizers`. One text of each batch goes through both."""
        known = fast.known(texts)
        found = dict(zip(known, _encoded(fast, [texts[n] for n in known], [masks[n] for n in known]), strict=True))
        sure = {number: encoded for number, encoded in found.items() if encoded is not None}
        others = [number for number in range(len(texts)) if number not in sure]
        checked = list(sure)[self._num_batches % len(sure) :][:1] if sure else []
        self._num_batches += 1
        again = [*others, *checked]
        slow = dict(zip(again, self._slowly([texts[n] for n in again], [masks[n] for n in again]), strict=True))
        for number in checked:
            if not _are_same(slow[number], sure[number]):
                raise DataError(
                    f"model.tokenizer: tiktoken tokenises {texts[number][:60]!r} ... otherwise than the tokenizer "
                    "itself; pip uninstall tiktoken (preparation then uses the tokenizer itself, which is "
                    "slower), delete the cache and run again"
                )
        return [sure[number] if number in sure else slow[number] for number in range(len(texts))]


def _are_same(one: Encoded, other: Encoded) -> bool:
    """Whether ids are equal, and the tokens under each span; a span without tokens can be written in many ways."""
    return np.array_equal(one.ids, other.ids) and _covered(one) == _covered(other)


def _covered(encoded: Encoded) -> list[tuple[int, int]]:
    return [(first, end) if end > first else (0, 0) for first, end in encoded.ranges]


def _encoded(fast: ByteBpe, texts: Sequence[str], masks: Sequence[Sequence[Span]]) -> list[Encoded | None]:
    """Each text in tiktoken's tokens, None where it is not sure of them."""
    if not texts:
        return []
    tokens = fast.encode(texts)
    edges, offset = [], 0
    for text, spans in zip(texts, masks, strict=True):
        size = len(text) if text.isascii() else len(text.encode())
        if size == len(text):
            edges += [(offset + span.start, offset + span.end) for span in spans]
        else:
            edges += [(offset + _bytes(text, span.start), offset + _bytes(text, span.end)) for span in spans]
        offset += size + 1
    firsts, lasts = tokens.covering(*np.array(edges, np.int64).reshape(-1, 2).T)
    unsure = set(fast.unsure(tokens).tolist())
    ranges = zip(firsts.tolist(), lasts.tolist(), strict=True)
    encoded: list[Encoded | None] = []
    for number, (first, last) in enumerate(zip(tokens.first.tolist(), tokens.last.tolist(), strict=True)):
        own = [(a - first, b - first) for a, b in (next(ranges) for _ in masks[number])]
        encoded.append(None if number in unsure else Encoded(tokens.ids[first:last], own))
    return encoded


def _bytes(text: str, end: int) -> int:
    """How many bytes the first `end` characters are."""
    return len(text[:end].encode())
