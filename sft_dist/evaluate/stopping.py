"""End generation at a stop text of several tokens, whatever the tokenizer.

Looks at decoded text. (The criterion that ships with transformers spells out every token of the vocabulary in advance,
and fails for tokenizers that cannot spell arbitrary letters, word-level ones for example.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

SLACK_TOKENS = 8  # tokens that may stand between without adding text


class StopText(StoppingCriteria):
    """True for each row whose newest tokens complete one of `stops`. Text before the answer is not looked at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], num_prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._first = tokenizer, stops, num_prompt_tokens
        self._num_seen = max(len(stop.encode()) for stop in stops) + SLACK_TOKENS  # a token is at least one byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        """bool[B] from ids int64[B, S]."""
        tail = input_ids[:, max(self._first, input_ids.shape[1] - self._num_seen) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)  # type: ignore[return-value]


def stopping_criteria(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], num_prompt_tokens: int
) -> StoppingCriteriaList:
    """What `generate` takes as `stopping_criteria`; empty without stop texts."""
    return StoppingCriteriaList([StopText(tokenizer, stops, num_prompt_tokens)] if stops else [])
