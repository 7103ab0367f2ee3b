"""What a template writes around the words of a conversation, learned once and used for all of the same shape.

    system, user, assistant        <|system|>  S  <|end|>  <|user|>  U  <|end|>  <|assistant|>  A.strip()  <|end|>
                                                                                               `--- learned ---`

Most templates never look at what is said: they put it between their own texts. Rendering them again for each record
costs more than tokenising it. A template is rendered with *opaque* contents (`provenance.Opaque`), which can only be
put somewhere; one that does more with them raises, and has no skeleton. Questions such as "does it hold `</think>`"
are answered with no and noted; a record to which the answer is yes is rendered in full, as are messages with more than
a role and a content, tools, and empty contents. Spans under loss are found in the same way, at edges of contents and
inside the template's own text only. Two very different stand-ins must give the same skeleton, and of the records that
are put together from one, the first ones and one in `CHECKED` are rendered in full and compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sft_dist.data.provenance import CONTENT, FIRST_OPERATION, OPERATIONS, TAGGED, Traced, letter, opaque_text, runs
from sft_dist.data.rendering import Rendered
from sft_dist.data.supervision import Span
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

STAND_INS = ("w", ' \n"&\\<|im_end|></s><end_of_turn>[/INST]</think>\u00e9\u6f22\U0001f389 {{ x }}\n\t ')
CHECKED = 256
FEW = 3  # seen so often, a shape is worth learning
_LONGEST = 1 << 20  # characters; what is longer goes through the budget of a full rendering

Shape = tuple[tuple[str, float | None], ...]  # role and weight of each message
Edge = tuple[int, int]  # how many contents, and how many characters of the template, stand before it
Condition = tuple[int, int, str, str]  # (message, slot, question, what): the answer must be no


class NoSkeleton(Exception):
    """The spans of this shape depend on what is said."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The text and the spans of all conversations of one shape."""

    literals: tuple[str, ...]  # what stands before each content, and behind the last
    contents: tuple[tuple[int, int], ...]  # (message, slot)
    conditions: frozenset[Condition]
    spans: tuple[tuple[Edge, Edge, float, int | None], ...]

    def fill(self, messages: Sequence[Message]) -> tuple[str, list[Span]] | None:
        """The text of a conversation and its spans; None where it has to be rendered."""
        for message in messages:
            if not message.content or message.content.isspace():
                return None
        for number, slot, question, what in self.conditions:
            if getattr(_cut(messages[number].content, slot), question)(what):
                return None
        pieces, before = [self.literals[0]], [0]
        for (number, slot), literal in zip(self.contents, self.literals[1:], strict=True):
            content = _cut(messages[number].content, slot)
            before.append(before[-1] + len(content))
            pieces += (content, literal)
        text = "".join(pieces)
        if len(text) > _LONGEST:
            return None
        return text, [
            Span(before[first[0]] + first[1], before[last[0]] + last[1], weight, answer)
            for first, last, weight, answer in self.spans
        ]


def shape_of(conversation: Conversation) -> Shape | None:
    """The shape of a conversation of plain messages, None for others."""
    if conversation.tools:
        return None
    shape = []
    for message in conversation.messages:
        if message.extra:
            return None
        shape.append((message.role, message.weight))
    return tuple(shape)


def learn(
    shape: Shape,
    render: Callable[[Conversation], tuple[Traced, list[Condition]] | None],
    supervise: Callable[[Rendered, Conversation], tuple[str, list[Span]]],
) -> Skeleton | None:
    """The skeleton of `shape`, None where there is none.

    `render` gives the text with opaque contents, `supervise` the final text and the spans of a rendered conversation.
    """
    found = {_learn(shape, stand_in, render, supervise) for stand_in in STAND_INS}
    return found.pop() if len(found) == 1 else None


def _learn(
    shape: Shape,
    stand_in: str,
    render: Callable[[Conversation], tuple[Traced, list[Condition]] | None],
    supervise: Callable[[Rendered, Conversation], tuple[str, list[Span]]],
) -> Skeleton | None:
    conversation = Conversation(tuple(Message(role, stand_in, weight) for role, weight in shape))
    seen = render(conversation)
    if seen is None:
        return None
    opaque, conditions = seen
    said = [run for run in runs(opaque) if run.message >= 0 and run.slot in _SLOTS]
    if any(opaque_text(opaque)[run.start : run.end] != stand_in for run in said):
        return None  # two in a row, which a content of another length would not show
    try:
        text, spans = supervise(Rendered(_plain(opaque, len(shape))), conversation)
    except (BadRecord, NoSkeleton):
        return None
    starts = [run.start for run in said]
    edges = [(_edge(span.start, starts, len(stand_in)), _edge(span.end, starts, len(stand_in))) for span in spans]
    if any(edge is None for pair in edges for edge in pair):
        return None
    ends = [0, *(run.end for run in said)]
    return Skeleton(
        literals=tuple(text[end:start] for end, start in zip(ends, [*starts, len(text)], strict=True)),
        contents=tuple((run.message, run.slot) for run in said),
        conditions=frozenset(conditions),
        spans=tuple(
            (first, last, span.weight, span.answer)
            for (first, last), span in zip(edges, spans, strict=True)
            if first is not None and last is not None
        ),
    )


def _plain(opaque: Traced, num_messages: int) -> Traced:
    """The same text, of which anything may be asked, with each content owned as a full rendering would own it."""
    owners = {
        ord(letter(number, slot)) | tag: ord(letter(number, CONTENT)) | tag
        for number in range(num_messages)
        for slot in _SLOTS
        for tag in (0, TAGGED)
    }
    return Traced(opaque_text(opaque), opaque._origin.translate(owners))


def _edge(place: int, starts: Sequence[int], length: int) -> Edge | None:
    """`place` as contents and characters of the template before it; None inside a content."""
    before = bisect_right(starts, place - length)
    if before < len(starts) and starts[before] < place:
        return None
    return before, place - before * length


def _cut(content: str, slot: int) -> str:
    """`content` as the operation of its slot leaves it."""
    if slot == CONTENT:
        return content
    name, characters = OPERATIONS[slot - FIRST_OPERATION]
    cut: str = getattr(content, name)(characters)
    return cut


_SLOTS = (CONTENT, *range(FIRST_OPERATION, FIRST_OPERATION + len(OPERATIONS)))
