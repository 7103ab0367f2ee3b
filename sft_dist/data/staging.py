"""Source files to tokenised rows, in bounded memory: read, recognise, tokenise in batches, trim, drop, count.

    records -> conversations -> (content key, TokenizedExample) of every row that can be trained

What a row loses: the tokens after its last target (nothing would learn from them) and, under
`long_examples: truncate`, everything beyond `seq_len`. What is not used is counted by reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.config.schema import DataSection, SourceSection
from sft_dist.data.formats import detect_format, rename_columns, to_conversation
from sft_dist.data.report import PrepareReport, SourceReport
from sft_dist.data.sources import Record, Rejects, read_records
from sft_dist.data.splits import content_key
from sft_dist.data.store import count_targets
from sft_dist.data.templates import ChatTemplate
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_RECORDS = 512  # per native tokenizer call


@dataclass(frozen=True, slots=True)
class Row:
    """A trainable example and the key of what it says, whatever file it stands in."""

    content: bytes  # 32 bytes
    example: TokenizedExample


class Stager:
    """Turns sources into rows and fills the report on the way."""

    def __init__(
        self,
        data: DataSection,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        report: PrepareReport,
        progress: Callable[[Record], None],
    ) -> None:
        self._data, self._tokenizer, self._template = data, tokenizer, template
        self._report, self._progress = report, progress
        self._rejects = Rejects(data.on_bad_record, data.max_bad_fraction)
        self._seen: set[bytes] = set()

    def rows(self, source: SourceSection, counts: SourceReport) -> Iterator[Row]:
        """The trainable rows of `source` in file order, counted in `counts`.

        Raises BadRecord at the first bad record under `on_bad_record: stop`.
        """
        rejected_before = len(self._rejects.records)
        conversations = self._conversations(source, counts)
        while batch := list(islice(conversations, _BATCH_RECORDS)):
            tokenised = self._template.tokenize_batch(
                batch,
                self._tokenizer,
                loss_on=self._data.loss_on,
                prompt_loss_weight=self._data.prompt_loss_weight,
            )
            for conversation, result in zip(batch, tokenised, strict=True):
                if isinstance(result, BadRecord):
                    self._rejects.reject(result)
                elif (example := self._fit(result, counts)) is not None:
                    yield self._accept(Row(content_key(conversation), example), counts)
        counts.rejected = len(self._rejects.records) - rejected_before
        counts.records = counts.accepted + counts.too_long + counts.no_target + counts.rejected

    def finish(self) -> None:
        """List the rejects; raise DataError when they are more than `data.max_bad_fraction` allows."""
        self._report.rejects = [
            {"file": bad.file, "line": bad.line, "byte": bad.byte, "reason": bad.reason}
            for bad in self._rejects.records
        ]
        self._rejects.finish(sum(source.records for source in self._report.sources))

    def _conversations(self, source: SourceSection, counts: SourceReport) -> Iterator[Conversation]:
        formats: dict[str, str] = {}  # file -> format: the files of a directory need not be alike
        for number, record in enumerate(read_records(source.path, self._rejects)):
            if number % _BATCH_RECORDS == 0:
                self._progress(record)
            try:
                if record.file not in formats:
                    formats[record.file] = self._format_of(record, source, counts)
                yield to_conversation(record, formats[record.file], source.columns)
            except BadRecord as error:
                self._rejects.reject(error)

    def _format_of(self, record: Record, source: SourceSection, counts: SourceReport) -> str:
        """The format of a file: as the recipe says, else what its first good record looks like."""
        counts.guessed = source.format == "auto"
        name = _detect(record, source) if counts.guessed else source.format
        counts.files.append(record.file)
        counts.formats = sorted({*counts.formats, name})
        return name

    def _fit(self, example: TokenizedExample, counts: SourceReport) -> TokenizedExample | None:
        """The part of an example that is trained, or None when it is dropped."""
        trimmed, longest = trim(example), self._data.seq_len
        length = len(trimmed.input_ids)
        if length > longest and self._data.long_examples == "drop":
            counts.too_long += 1
            self._report.drop(example.id, f"{length} tokens, more than data.seq_len={longest}")
            return None
        fitted = trim(keep(trimmed, longest))
        if len(fitted.input_ids) < 2:
            counts.no_target += 1
            self._report.drop(example.id, f"nothing is supervised in its first {longest} tokens")
            return None
        counts.truncated += length > longest
        return fitted

    def _accept(self, row: Row, counts: SourceReport) -> Row:
        counts.accepted += 1
        counts.tokens += len(row.example.input_ids)
        counts.loss_tokens += count_targets(row.example.loss_weights)[0]
        counts.duplicates += row.content in self._seen
        self._seen.add(row.content)
        return row


def _detect(record: Record, source: SourceSection) -> str:
    try:
        return detect_format(rename_columns(record.value, source.columns))
    except BadRecord as error:
        raise record.bad(error.reason) from None


def trim(example: TokenizedExample) -> TokenizedExample:
    """Without the tokens after the last target; one token or none is left where there is no target.

    The first token of a document is never a target: nothing stands before it.
    """
    return keep(example, int(np.flatnonzero(example.loss_weights > 0).max(initial=0)) + 1)


def keep(example: TokenizedExample, length: int) -> TokenizedExample:
    """The first `length` tokens."""
    answers = tuple((start, min(end, length)) for start, end in example.answers if start < length)
    return replace(
        example, input_ids=example.input_ids[:length], loss_weights=example.loss_weights[:length], answers=answers
    )
