"""What exists of a run before any process group: recipe, tokenizer and prepared data, the same on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from sft_dist.checkpoint.export_certificate import Words
from sft_dist.config.schema import Recipe
from sft_dist.data.inspect import sample_rows, short_line, view_example
from sft_dist.data.prepare import PreparedData, prepare
from sft_dist.data.store import TokenStore
from sft_dist.errors import ConfigError
from sft_dist.models.load import load_tokenizer
from sft_dist.observe.progress_lines import ProgressLines
from sft_dist.parallel.runtime import read_place
from sft_dist.resilience.heartbeat import heart

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Inputs:
    """What exists before any process group: the same on every rank."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


def read_inputs(recipe: Recipe, notice: Callable[[str], None]) -> Inputs:
    """Tokenizer and prepared data. Concurrent ranks share the preparation through the cache's lock."""
    tokenizer = load_tokenizer(recipe.model)
    is_first_here = read_place()[2] == 0
    lines = ProgressLines(_say)

    def progress(done: int, total: int) -> None:
        heart().stay("prepare")
        lines(done, total)

    def alive() -> None:
        heart().stay("prepare")
        lines.stay()

    def streaming(records: int) -> None:
        heart().stay("prepare")
        lines.stream(records)

    data = prepare(
        recipe,
        tokenizer,
        notice=notice,
        progress=progress,
        streaming=streaming,
        alive=alive,
        reads_streams=is_first_here,
    )
    for line in _guessed_examples(recipe, tokenizer, data):
        notice(line)
    return Inputs(recipe, tokenizer, data)


def _guessed_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> list[str]:
    """A wrong guess of a format is seen at once: three examples, when the data were prepared for this run."""
    if not (data.is_new and any(source.guessed for source in data.report_now().sources)):
        return []
    rows = sample_rows(len(data.train), _EXAMPLES, recipe.run.seed)
    views = [view_example(data.train.example(row), row=row, tokenizer=tokenizer) for row in rows]
    title = f"{len(rows)} examples, learned text in ⟦⟧ (whole ones: sft-dist data inspect --row N):"
    return [title, *(f"  {short_line(view)}" for view in views)]


def _say(line: str) -> None:
    """On the standard error of the one process that prepares, whichever rank got there first."""
    print(line, file=sys.stderr, flush=True)


def words_of(inputs: Inputs) -> Words:
    """What an export says beside its weights."""
    template, tokenizer = inputs.data.template, inputs.tokenizer
    return Words(tokenizer, template.text, template.stop_token_ids(tokenizer))


def longest_example(inputs: Inputs) -> int:
    """Tokens of the longest example of any split; of a stream, what its longest may have."""
    if inputs.recipe.data.streams:
        return inputs.recipe.data.seq_len
    splits = (inputs.data.train, inputs.data.eval)
    return max(int(np.max(store.lengths)) for store in splits if isinstance(store, TokenStore))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; eos where the tokenizer has no pad token (it carries no label, so nothing learns it)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ConfigError("model.tokenizer has neither pad nor eos token: name one in its tokenizer_config.json")
