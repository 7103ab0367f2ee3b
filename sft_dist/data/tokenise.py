"""Records to tokenised rows, a pure function of the records and the rules: the same in every process.

    records -> conversations -> tokens with weights -> trimmed, fitted to seq_len -> Shard

What a row loses: the tokens after its last target (nothing would learn from them) and, under `long_examples: truncate`,
everything beyond `seq_len`. What is not used is listed with its record and the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa

from sft_dist.config.schema import ScoreSection, SourceSection
from sft_dist.data.encoder import Encoded
from sft_dist.data.filters import score_too_low
from sft_dist.data.formats import detect_format, fits, rename_columns, to_conversations
from sft_dist.data.forms import load_forms
from sft_dist.data.plain_tokenizer import PlainTokenizer
from sft_dist.data.sources import Record
from sft_dist.data.splits import content_key, question_key
from sft_dist.data.store import to_table
from sft_dist.data.templates import ChatTemplate, SupervisedBatch
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, TokenizedExample

_BATCH_EXAMPLES = 128  # per native tokenizer call
_OF_INSTANCES = "natural_instructions"  # its task files are one record of thousands of examples

Given = tuple[int, str, Conversation | TokenizedExample]  # number of the record, which of its examples, the example
T = TypeVar("T")
BESIDE = ("unknown", "record", "part", "instance")  # columns of a shard that the store does not have
Kind = Literal["rejected", "too_long", "no_target", "truncated", "split", "form_skipped", "score"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything besides the records that decides the rows."""

    tokenizer: PlainTokenizer
    template: ChatTemplate
    loss_on: str
    prompt_loss_weight: float
    seq_len: int
    long_examples: str  # drop | truncate | split
    score: ScoreSection | None = None

    def expect_many(self) -> None:
        """Set up what pays with many conversations."""
        self.template.bind(self.tokenizer).encoder.expect_many()

    def supervise(self, conversations: Sequence[Conversation]) -> SupervisedBatch:
        """Texts and masks of `conversations`."""
        return self.template.supervise_batch(
            conversations, self.tokenizer, loss_on=self.loss_on, prompt_loss_weight=self.prompt_loss_weight
        )


@dataclass(frozen=True, slots=True)
class Event:
    """Something a user should know about one example: `part` tells which of its record's (empty: the only one)."""

    record: int
    part: str
    kind: Kind
    reason: str


@dataclass(slots=True)
class Shard:
    """The rows of some numbered records, in order, and what became of the others.

    `table`: the columns of `store.to_table`, and those of `BESIDE`: `unknown` int32 (tokens for what the tokenizer
    cannot spell), `record` int32 (number of the record), `part` string, and `instance` uint64: what is asked, where the
    examples of a record are independent of each other, else 0.
    """

    table: pa.Table
    events: list[Event] = field(default_factory=list)


def tokenise(records: Iterable[tuple[int, Record]], source: SourceSection, format: str, rules: Rules) -> Shard:
    """Tokenise numbered records of one format. What cannot be used becomes an event, never an exception."""
    rows: list[tuple[int, str, TokenizedExample]] = []
    contents: list[int] = []
    instances: list[int] = []
    events: list[Event] = []
    for number, part, given, result in _tokens(_read(records, source, format, rules, events), rules):
        if isinstance(result, BadRecord):
            events.append(Event(number, part, "rejected", result.reason))
            continue
        fitted, event = fit(result, rules)
        if event:
            events.append(Event(number, part, *event))
        content, instance = content_key(given), question_key(given) if format == _OF_INSTANCES else 0
        rows += [(number, part + piece, example) for piece, example in fitted]
        contents += [content] * len(fitted)
        instances += [instance] * len(fitted)
    table = to_table([example for _, _, example in rows], contents)
    unknown = rules.tokenizer.unknown_id
    lost = [0 if unknown is None else np.count_nonzero(example.input_ids == unknown) for _, _, example in rows]
    table = table.append_column("unknown", pa.array(lost, pa.int32()))
    table = table.append_column("record", pa.array([number for number, _, _ in rows], pa.int32()))
    table = table.append_column("part", pa.array([part for _, part, _ in rows], pa.string()))
    return Shard(table.append_column("instance", pa.array(instances, pa.uint64())), events)


def _read(
    records: Iterable[tuple[int, Record]], source: SourceSection, format: str, rules: Rules, events: list[Event]
) -> Iterator[Given]:
    """What is to be tokenised of each record."""
    forms = load_forms(source.template) if source.template else None
    for number, record in records:
        skipped = lambda reason: events.append(Event(number, "", "form_skipped", reason))  # noqa: B023, E731 (called here)
        spoiled = lambda reason: events.append(Event(number, "", "rejected", reason))  # noqa: B023, E731 (likewise)
        if rules.score and (low := score_too_low(record.value, rules.score.column, rules.score.min)):
            events.append(Event(number, "", "score", low))
            continue
        try:
            if source.format == "auto":
                _check_guess(record, source, format)
            found = to_conversations(record, format, source.columns, forms, skipped, spoiled)
        except BadRecord as error:
            events.append(Event(number, "", "rejected", error.reason))
            continue
        yield from ((number, one.id.removeprefix(record.id), one) for one in found)


def _check_guess(record: Record, source: SourceSection, format: str) -> None:
    """A guess holds for the whole file: no record may look like another format, or hold a field that this one drops."""
    value = rename_columns(record.value, source.columns)
    try:
        found = detect_format(value)
    except BadRecord:
        if fits(format, value):
            raise
        return  # a field is missing: the reader of the format says which
    if found != format:
        raise BadRecord(f"it looks like {found}, the file's first record like {format}: set format= of the source")


def _tokens(
    given: Iterator[Given], rules: Rules
) -> Iterator[tuple[int, str, Conversation | TokenizedExample, TokenizedExample | BadRecord]]:
    """Each with its tokens; what is tokens already stays as it is.

    While the tokenizer, which is native, works on one batch, the next one is rendered.
    """
    with ThreadPoolExecutor(1) as native:

        def begun() -> Iterator[tuple[list[Given], SupervisedBatch, Future[list[Encoded]]]]:
            while batch := list(islice(given, _BATCH_EXAMPLES)):
                texts = rules.supervise([one for _, _, one in batch if isinstance(one, Conversation)])
                yield batch, texts, native.submit(texts.encode)

        for batch, texts, encodings in _one_ahead(begun()):
            tokenised = iter(texts.examples(encodings.result()))
            for number, part, one in batch:
                yield number, part, one, _known(one, rules) if isinstance(one, TokenizedExample) else next(tokenised)


def _known(example: TokenizedExample, rules: Rules) -> TokenizedExample | BadRecord:
    """Tokens that somebody else made are taken as they are, if the tokenizer has them."""
    largest, size = int(example.input_ids.max(initial=0)), len(rules.tokenizer)
    if largest < size:
        return example
    return BadRecord(f"token {largest} is not one of the tokenizer's {size:,}: was another tokenizer used?")


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given out when the one behind it has been begun."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def fit(example: TokenizedExample, rules: Rules) -> tuple[list[tuple[str, TokenizedExample]], tuple[Kind, str] | None]:
    """What is trained of an example, as (name of the piece, example), and what there is to say about it."""
    trimmed, longest = trim(example), rules.seq_len
    length = len(trimmed.input_ids)
    if length < 2:
        return [], ("no_target", "nothing in it is supervised")
    if length <= longest:
        return [("", trimmed)], None
    what = f"{length} tokens, more than data.seq_len={longest}"
    if rules.long_examples == "drop":
        return [], ("too_long", what)
    if rules.long_examples == "split":
        pieces = split(trimmed, longest)
        return [(f"/{n}", piece) for n, piece in enumerate(pieces, 1)], ("split", f"{what}: {len(pieces)} pieces")
    fitted = trim(keep(trimmed, longest))
    if len(fitted.input_ids) < 2:
        return [], ("no_target", f"nothing is supervised in its first {longest} tokens")
    return [("", fitted)], ("truncated", f"{what}: {_lost(trimmed, fitted)} of its supervised tokens are cut off")


def trim(example: TokenizedExample) -> TokenizedExample:
    """Without the tokens after the last target; one token or none is left where there is no target.

    The first token of a document is never a target: nothing stands before it.
    """
    backwards = example.loss_weights[::-1] > 0
    last = int(backwards.argmax()) if len(backwards) else 0  # place of the last target, from the end
    return keep(example, len(backwards) - last if len(backwards) and backwards[last] else 1)


def keep(example: TokenizedExample, length: int, start: int = 0) -> TokenizedExample:
    """The tokens from `start` on, at most `length` of them."""
    end = start + length
    if not start and end >= len(example.input_ids):
        return example
    if not start and all(b <= end for _, b in example.answers):
        ids, weights = example.input_ids[:end], example.loss_weights[:end]
        return TokenizedExample(ids, weights, example.source, example.id, example.answers)
    answers = tuple((max(a, start) - start, min(b, end) - start) for a, b in example.answers if a < end and b > start)
    ids, weights = example.input_ids[start:end], example.loss_weights[start:end]
    return replace(example, input_ids=ids, loss_weights=weights, answers=answers)


def split(example: TokenizedExample, longest: int) -> list[TokenizedExample]:
    """Pieces of at most `longest` tokens that together hold every target exactly once.

    A piece begins with the last token of the one before it, as context: a first token is never a target. Pieces
    without a target are left out.
    """
    starts = range(0, len(example.input_ids) - 1, longest - 1)
    pieces = (trim(keep(example, longest, start)) for start in starts)
    return [piece for piece in pieces if len(piece.input_ids) > 1]


def _lost(whole: TokenizedExample, kept: TokenizedExample) -> str:
    targets, left = (int(np.count_nonzero(e.loss_weights[1:] > 0)) for e in (whole, kept))
    return f"{targets - left:,} of {targets:,}"
