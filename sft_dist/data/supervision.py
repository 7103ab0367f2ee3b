"""Which characters of a rendered conversation are learned.

A *turn* is what one message wrote: from its first to its last character in the text, with the literals between (the
`</think>` between reasoning and answer, the JSON around a function's name), then the stop text behind it. Rules:

- An assistant turn is supervised from the first character of its content, and so is what the model must write to open
  it: a channel's header (`openings`) before content, `<think>` before reasoning, `<tool_call>{"name": "` before a
  function call. The rest before it (role header, an empty think block) belongs to the prompt; the caller tells them
  apart.
- The stop text is supervised whole: everything up to and including the first stop or special token behind the turn.
  A newline after it is not.
- A template with `{% generation %}` tags states all of this itself, and is followed to the character, after a check
  that the tags hold everything the assistant said.
- Content whose origin got lost in the template is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from sft_dist.data.provenance import ARGUMENTS, CONTENT, HEADER, NAMES, REASONING, ROLE, TOOLS, Run
from sft_dist.data.rendering import Rendered
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message

PROMPT_ROLES = ("system", "developer", "user")  # what `prompt_loss_weight` counts as instruction
SPEAKERS = ("assistant",)


class Span(NamedTuple):
    """Characters [start, end) with the weight of their tokens as targets."""

    start: int
    end: int
    weight: float
    answer: int | None = None  # number of the assistant message that wrote them


class Turn(NamedTuple):
    """What message `message` wrote: characters [start, end)."""

    message: int
    start: int
    end: int
    opens_with: int  # slot of its first run
    again: bool = False  # the template writes parts of the message a second time elsewhere


class Stops:
    """Finds where a turn's stop text ends.

    Known stops are the tokenizer's special tokens and the marker the template itself puts behind an answer, which may
    be ordinary text (several tokens) for a tokenizer that never saw the template.
    """

    _MARKER = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]{2,32}\]")

    def __init__(self, tokens: Iterable[str]) -> None:
        known = sorted({token for token in tokens if token}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def find(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """First known stop in text[start:end], else the first thing that looks like a marker: (start, end)."""
        match = (self._known and self._known.search(text, start, end)) or self._MARKER.search(text, start, end)
        return match.span() if match else None

    def earliest(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """The earlier of a known stop and a marker-like text: what the template says after a plain answer."""
        matches = [pattern.search(text, start, end) for pattern in (self._known, self._MARKER) if pattern]
        return min((match.span() for match in matches if match), key=lambda span: (span[0], -span[1]), default=None)


def message_weights(messages: Sequence[Message], loss_on: str) -> list[float]:
    """Weight of each message's turn. A message's own `weight` always wins over `loss_on`."""
    spoken = [i for i, message in enumerate(messages) if message.role == "assistant"]
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    chosen = {
        "assistant": spoken,
        "last_turn": spoken[-1:],
        "completion": [i for i in spoken if i > last_user],
        "all": range(len(messages)),
    }[loss_on]
    return [float(i in chosen) if message.weight is None else message.weight for i, message in enumerate(messages)]


def supervise(
    rendered: Rendered,
    conversation: Conversation,
    *,
    stops: Stops,
    loss_on: str,
    prompt_loss_weight: float,
    header_end: Callable[[Turn], int],
    opening_start: Callable[[Turn], int],
) -> list[Span]:
    """Spans of the rendered text that are targets; where spans overlap the larger weight counts.

    `header_end(turn)` tells where the role header before a turn ends that opens with reasoning or a function call,
    `opening_start(turn)` where it ends before a turn that opens with content.
    Raises BadRecord when the template dropped a message or lost the origin of a supervised one.
    """
    messages = conversation.messages
    weights = message_weights(messages, loss_on)
    turns = find_turns(rendered.runs)
    _check_nothing_left_out(rendered, conversation)
    for i, weight in enumerate(weights):
        if weight > 0:
            _check_followed(rendered, messages[i], i, turns)
    if loss_on == "all":
        return [_whole_run(run, messages, weights) for run in rendered.runs]
    spans = _instructions(rendered.runs, messages, prompt_loss_weight)
    tagged = _tagged_regions(rendered.runs)
    for i, weight in enumerate(weights):
        if weight > 0 and i in tagged:
            spans += [Span(*piece, weight, i) for piece in _as_tagged(rendered, turns[i], tagged[i], stops)]
        elif weight > 0:
            start, end = _as_said(rendered, messages[i].content, turns[i], stops, header_end)
            opening = opening_start(turns[i]) if turns[i].opens_with == CONTENT else start
            spans += [Span(opening, start, weight)] * (opening < start)  # learned, but not a part of what is answered
            spans.append(Span(start, end, weight, i))
    return spans


def _whole_run(run: Run, messages: Sequence[Message], weights: Sequence[float]) -> Span:
    """A run under `loss_on: all`, where headers are learned too but do not belong to the answer."""
    if run.message < 0:
        return Span(run.start, run.end, 1.0)
    spoken = messages[run.message].role in SPEAKERS and run.slot not in (ROLE, HEADER)
    return Span(run.start, run.end, weights[run.message], run.message if spoken else None)


def _instructions(runs: Sequence[Run], messages: Sequence[Message], weight: float) -> list[Span]:
    """What system and user wrote, at the weight of instruction modelling; template literals never count."""
    asked = {i for i, message in enumerate(messages) if message.role in PROMPT_ROLES and message.weight is None}
    chosen = (run for run in runs if run.slot == CONTENT and run.message in asked)
    return [Span(run.start, run.end, weight) for run in chosen] if weight > 0 else []


def find_turns(runs: Sequence[Run]) -> dict[int, Turn]:
    """Message number -> its turn: from its first run to the last one before another message speaks."""
    turns: dict[int, Turn] = {}
    names: set[int] = set()
    speaking = -1
    for run in runs:
        if run.message < 0:
            continue
        if not _is_said(run, names):
            speaking = speaking if run.message == speaking else -1
        elif run.message == speaking:
            turns[speaking] = turns[speaking]._replace(end=run.end)
        elif run.message in turns:
            turns[run.message] = turns[run.message]._replace(again=True)
        else:
            speaking = run.message
            turns[speaking] = Turn(speaking, run.start, run.end, run.slot)
    return turns


def _is_said(run: Run, names: set[int]) -> bool:
    """Whether the message itself says this; the name of a function that comes up again heads the tool's answer."""
    if run.slot < NAMES:
        return run.slot in (CONTENT, REASONING, ARGUMENTS)
    name = run.message << 6 | run.slot
    repeated = name in names
    names.add(name)
    return not repeated


def literal_after(rendered: Rendered, turn: Turn) -> int:
    """End of the template's own text behind a turn: where something else begins, or the text ends."""
    following = (run for run in rendered.runs if run.start >= turn.end and run.message != turn.message)
    return next((run.start for run in following if not run.is_literal), len(rendered.text))


def header_start(rendered: Rendered, message: int, end: int) -> int:
    """Start of the header in text[:end] of message number `message`: where the message before it ends."""
    others = (run.end for run in rendered.runs if run.end <= end and not run.is_literal and run.message != message)
    return max(others, default=0)


def _as_said(
    rendered: Rendered, content: str, turn: Turn, stops: Stops, header_end: Callable[[Turn], int]
) -> tuple[int, int]:
    start = _opening(rendered, content, turn) if turn.opens_with == CONTENT else header_end(turn)
    stop = stops.find(rendered.text, turn.end, literal_after(rendered, turn))
    return start, stop[1] if stop else turn.end


def _opening(rendered: Rendered, content: str, turn: Turn) -> int:
    """Where the content begins: further left when the template took its opening (`<think>`) off and wrote it anew."""
    first = next(run for run in rendered.runs if run.start == turn.start)
    opening = content.partition(rendered.text[first.start : first.end])[0].strip()
    before = rendered.text[: turn.start].rstrip()
    return len(before) - len(opening) if opening and before.endswith(opening) else turn.start


def _tagged_regions(runs: Sequence[Run]) -> dict[int, list[tuple[int, int]]]:
    """Message number -> its pieces inside generation tags.

    Literals in a region belong to its message; a region without one (an end token in tags of its own) belongs to the
    message before it.
    """
    regions: dict[int, list[tuple[int, int]]] = {}
    owner = -1
    for tagged, group in groupby(runs, key=lambda run: run.tagged):
        if not tagged:
            continue
        region = list(group)
        owner = next((run.message for run in region if run.message >= 0), owner)
        for run in region:
            owner = run.message if run.message >= 0 else owner
            regions.setdefault(owner, []).append((run.start, run.end))
    return regions


def _as_tagged(rendered: Rendered, turn: Turn, region: list[tuple[int, int]], stops: Stops) -> list[tuple[int, int]]:
    """The author's region; a stop text right behind it is added, for tags that leave it out."""
    end = region[-1][1]
    if stops.find(rendered.text, turn.end, end):
        return region
    stop = stops.find(rendered.text, end, literal_after(rendered, turn))
    return [*region, (end, stop[1])] if stop else region


def _check_nothing_left_out(rendered: Rendered, conversation: Conversation) -> None:
    """Every message and the tools must be in the text; a template that drops one would train on something else."""
    if _has_unknown(rendered):
        return  # what is missing may be there, its origin lost; supervised messages are checked one by one
    seen = {(run.message, run.slot) for run in rendered.runs}
    present = {message for message, slot in seen if slot != ROLE}
    calling = {message for message, slot in seen if slot >= ARGUMENTS}
    for i, message in enumerate(conversation.messages):
        if i not in present and message.content.strip():
            raise BadRecord(f"the chat template leaves out message {i + 1} ({message.role})")
        if i not in calling and message.extra.get("tool_calls"):
            raise BadRecord(f"the chat template leaves out the function call of message {i + 1}")
    if conversation.tools and (-1, ord(TOOLS)) not in seen:
        raise BadRecord("the chat template leaves out the tools: use one that knows tools, or data without them")


def _check_followed(rendered: Rendered, message: Message, number: int, turns: dict[int, Turn]) -> None:
    """The supervised text of a message is the message, not a part of it whose other part lost its origin."""
    where = f"message {number + 1} ({message.role})"
    said = [run for run in rendered.runs if run.message == number and run.slot == CONTENT]
    text = "".join(rendered.text[run.start : run.end] for run in said)
    if text.strip() != message.content.strip() and _has_unknown(rendered):
        raise BadRecord(
            f"the chat template rewrites {where} with an operation that cannot be followed (such as escape or safe): "
            "its loss mask would be a guess. Use another data.chat_template"
        )
    if number not in turns:
        raise BadRecord(f"{where} holds no text to learn")
    if turns[number].again or (len(said) > 1 and len(text) > len(message.content)):
        raise BadRecord(f"the chat template writes {where} in two places: its loss mask would be a guess")
    inside = {run.tagged for run in said}
    if inside == {True, False}:
        raise BadRecord(f"the template's generation tags hold only a part of {where}")
    if message.role not in SPEAKERS and True in inside:
        raise BadRecord(f"the template's generation tags hold {where}, which the model does not write")


def _has_unknown(rendered: Rendered) -> bool:
    return any(run.is_unknown and rendered.text[run.start : run.end].strip() for run in rendered.runs)
