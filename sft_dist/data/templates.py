"""Conversations into tokens with a loss weight each.

    Conversation --render--> text, origin of each character --supervise--> character spans --tokenize--> loss weights

The whole text is tokenized once, so tokens are what a model sees in use; a token is a target when it covers at least
one supervised character. A template is text; bound to a tokenizer it also knows its stop texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.data.bos import begin_with_bos, begins_with
from sft_dist.data.builtin_templates import BUILTIN
from sft_dist.data.encoder import Encoded, Encoder
from sft_dist.data.openings import generation_prompt, opening
from sft_dist.data.plain_tokenizer import PlainTokenizer
from sft_dist.data.rendering import THOUGHTS, Rendered, render, render_opaque
from sft_dist.data.skeleton import CHECKED, FEW, NoSkeleton, Shape, Skeleton, learn, shape_of
from sft_dist.data.supervision import Span, Stops, Turn, find_turns, header_start, literal_after, supervise
from sft_dist.data.template_engine import compile_template
from sft_dist.data.token_masks import token_answers, token_weights
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, Message, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MOST_SHAPES = 4096
PLAIN_TEXT = "{{ messages[0].content }}{{ eos_token }}"  # conversations of format `text`: role "text", no template


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template by name; `text` is its Jinja source.

    `stop_text` overrides what the template itself writes behind an answer; None: found by rendering a probe.
    """

    name: str
    text: str
    stop_text: str | None = None

    def render(
        self,
        conversation: Conversation,
        *,
        bos_token: str | None,
        eos_token: str | None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Text and the origin of each character. Raises BadRecord when the template refuses the conversation."""
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        return self._render(conversation, {k: v for k, v in tokens.items() if v is not None}, add_generation_prompt)

    def _render(self, conversation: Conversation, tokens: Mapping[str, str], prompt: bool = False) -> Rendered:
        text = PLAIN_TEXT if _is_plain_text(conversation) else self.text
        return render(compile_template(text), conversation, tokens, add_generation_prompt=prompt)

    def bind(self, tokenizer: PreTrainedTokenizerFast | PlainTokenizer) -> BoundTemplate:
        """The template for one tokenizer; kept, so binding again is free."""
        return _bind(self, tokenizer, len(tokenizer))

    def tokenize(
        self,
        conversation: Conversation,
        tokenizer: PreTrainedTokenizerFast,
        *,
        loss_on: str,
        prompt_loss_weight: float = 0.0,
    ) -> TokenizedExample:
        """One conversation as token ids int32[L] and loss weights float32[L]; raises BadRecord."""
        batch = [conversation]
        (result,) = self.tokenize_batch(batch, tokenizer, loss_on=loss_on, prompt_loss_weight=prompt_loss_weight)
        if isinstance(result, BadRecord):
            raise result
        return result

    def tokenize_batch(
        self,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerFast,
        *,
        loss_on: str,
        prompt_loss_weight: float = 0.0,
    ) -> list[TokenizedExample | BadRecord]:
        """All conversations with one native tokenizer call; what cannot be used comes back as its BadRecord."""
        batch = self.supervise_batch(conversations, tokenizer, loss_on=loss_on, prompt_loss_weight=prompt_loss_weight)
        return batch.examples(batch.encode())

    def supervise_batch(
        self,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerFast | PlainTokenizer,
        *,
        loss_on: str,
        prompt_loss_weight: float = 0.0,
    ) -> SupervisedBatch:
        """The first half of `tokenize_batch`: texts and masks."""
        bound = self.bind(tokenizer)
        batch = SupervisedBatch(bound)
        for conversation in conversations:
            try:
                text, spans = bound.supervised_text(conversation, loss_on, prompt_loss_weight)
            except BadRecord as error:
                batch.frames.append(_located(error, conversation))
                continue
            batch.texts.append(text)
            batch.masks.append(spans)
            batch.frames.append(TokenizedExample(_NO_IDS, _NO_WEIGHTS, conversation.source, conversation.id))
        return batch

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids at which generation ends: stop texts that are one token, and the tokenizer's end token."""
        ids = [token[0] for token in self.bind(tokenizer).stop_ids.values() if len(token) == 1]
        return list(dict.fromkeys([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))

    def stop_strings(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Texts at which generation ends that are several tokens for this tokenizer."""
        return [text for text, token in self.bind(tokenizer).stop_ids.items() if len(token) > 1]

    def stop_notices(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """A line for each stop text that no model can write, or that an exported generation config has no place for."""
        unknown = PlainTokenizer.of(tokenizer).unknown_id
        return [
            _unspelled(text, tokenizer.decode(ids)) if unknown in ids else _of_several_tokens(text)
            for text, ids in self.bind(tokenizer).stop_ids.items()
            if len(ids) > 1 or unknown in ids
        ]

    def prompt_notices(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """A line where a model is asked in words that no trained answer stands behind."""
        asked, answered = self.bind(tokenizer).before_plain_answer()
        if answered.startswith(asked):
            return []
        return [
            f"warning: data.chat_template asks a model with {asked!r} and trains plain answers behind {answered!r}: "
            "the model would be asked in words that it has not learned to answer; make it write the same in both places"
        ]


def resolve_template(name_or_path: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """`auto` (the tokenizer's own), a built-in name, or the path of a Jinja file; with the BOS that this tokenizer puts
    before texts. Raises ConfigError."""
    return ChatTemplate(name_or_path, begin_with_bos(_template_text(name_or_path, tokenizer), tokenizer))


def _template_text(name_or_path: str, tokenizer: PreTrainedTokenizerFast) -> str:
    if name_or_path == "auto":
        return _own_template(tokenizer)
    if name_or_path in BUILTIN:
        return BUILTIN[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.chat_template={name_or_path}: not UTF-8 at byte {error.start}") from error
    close = get_close_matches(name_or_path, ["auto", *BUILTIN], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"data.chat_template={name_or_path}: must be auto, {', '.join(BUILTIN)} or the path of a Jinja file{hint}"
    )


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise ConfigError(
            "data.chat_template=auto: the tokenizer has no chat template of its own; "
            f"set data.chat_template to {', '.join(BUILTIN)} or the path of a Jinja file"
        )
    return own


def spans(loss_weights: np.ndarray) -> list[tuple[int, int]]:
    """Maximal token ranges [start, end) with weight > 0, in order."""
    edges = np.flatnonzero(np.diff((loss_weights > 0).astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@lru_cache(maxsize=8)
def _bind(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast | PlainTokenizer, vocabulary_size: int
) -> BoundTemplate:
    """`vocabulary_size` is part of the key because tokens can be added to a tokenizer."""
    return BoundTemplate(template, tokenizer)


@dataclass(slots=True)
class SupervisedBatch:
    """Rendered conversations on their way to the tokenizer: texts, the spans under loss, and what could not be used."""

    bound: BoundTemplate
    texts: list[str] = field(default_factory=list)
    masks: list[list[Span]] = field(default_factory=list)
    frames: list[TokenizedExample | BadRecord] = field(default_factory=list)  # of all, in order

    def encode(self) -> list[Encoded]:
        """The tokens of each text. Native: another thread can go on meanwhile."""
        return self.bound.encoder.encode(self.texts, self.masks)

    def examples(self, encoded: Sequence[Encoded]) -> list[TokenizedExample | BadRecord]:
        """The frames filled with tokens and weights."""
        tokens = iter(zip(self.texts, self.masks, encoded, strict=True))
        return [one if isinstance(one, BadRecord) else self.bound.example(one, *next(tokens)) for one in self.frames]


@dataclass(slots=True)
class _Known:
    """A shape of conversations: how many of it came, and its skeleton once it was learned."""

    seen: int = 0
    skeleton: Skeleton | None = None


def _no_skeleton(turn: Turn) -> int:
    raise NoSkeleton


def _unspelled(stop: str, spelled: str) -> str:
    return (
        f"warning: data.chat_template ends answers with {stop!r}, which this tokenizer cannot spell (it makes "
        f"{spelled!r} of it): no model can write it and no server can stop there; take another data.chat_template, or "
        "a tokenizer that has the text as a token"
    )


def _of_several_tokens(stop: str) -> str:
    return (
        f"warning: data.chat_template ends answers with {stop!r}, which is several tokens of this tokenizer; an "
        "exported generation config holds ids of single tokens only: take a tokenizer that has it as one, or pass "
        f"stop_strings=[{stop!r}] to generate"
    )


class BoundTemplate:
    """A template together with the tokenizer it writes for: special tokens, stop texts, where headers end."""

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast | PlainTokenizer) -> None:
        self.template, self.tokenizer = template, PlainTokenizer.of(tokenizer)
        self.encoder = Encoder(self.tokenizer)
        self.special_tokens, self.eos_token = self.tokenizer.special_tokens, self.tokenizer.eos_token
        self.bos_to_prepend = self.tokenizer.bos_of_texts
        self._shapes: dict[tuple[Shape, str, float], _Known] = {}
        self.knows_thoughts = any(name in template.text for name in ("reasoning_content", "thinking"))

    @cached_property
    def stops(self) -> Stops:
        return Stops([*self._special_texts, *self.stop_ids])

    @cached_property
    def stop_ids(self) -> dict[str, list[int]]:
        """Stop text -> its token ids, as the template ends a plain answer in the middle and at the end."""
        texts = [self.template.stop_text] if self.template.stop_text else self._probe_stops()
        return {text: self.tokenizer.encode(text) for text in texts}

    @property
    def _special_texts(self) -> list[str]:
        return [self.eos_token, *self.tokenizer.special_texts]

    def _probe_stops(self) -> list[str]:
        """What follows the answers of a two-turn conversation. A template that refuses it has no known stop."""
        turns = [Message(role, word) for word in ("one", "two") for role in ("user", "assistant")]
        specials = Stops(self._special_texts)
        try:
            rendered = self._render(Conversation(tuple(turns)))
        except BadRecord:
            return []
        said = [turn for number, turn in find_turns(rendered.runs).items() if number % 2]
        found = [specials.earliest(rendered.text, t.end, literal_after(rendered, t)) for t in said]
        texts = [rendered.text[slice(*stop)] for stop in found if stop]
        return list(dict.fromkeys(texts))

    @cached_property
    def prompt(self) -> str:
        """What the template writes to make a model speak. Of a template that refuses a question alone: nothing."""
        question = Conversation((Message("user", "one"),))
        try:
            return generation_prompt(self._render(question).text, self._render(question, prompt=True).text)
        except BadRecord:
            return ""

    def before_plain_answer(self) -> tuple[str, str]:
        """What the template writes between a question and a plain answer: asking for one, and with it there."""
        question, answer = Message("user", "one"), Message("assistant", "two")
        try:
            asked = self._render(Conversation((question,)), prompt=True)
            answered = self._render(Conversation((question, answer)))
        except BadRecord:
            return "", ""
        turns = find_turns(answered.runs)
        return asked.text[find_turns(asked.runs)[0].end :], answered.text[turns[0].end : turns[1].start]

    @cached_property
    def opening(self) -> str:
        """What the model writes itself before the words of a plain answer; of most templates nothing."""
        return opening(self._header(Conversation((Message("user", "one"), Message("assistant", ".")))), self.prompt)

    def _render(self, conversation: Conversation, prompt: bool = False) -> Rendered:
        return self.template._render(conversation, self.special_tokens, prompt)

    def supervised_text(
        self, conversation: Conversation, loss_on: str, prompt_loss_weight: float
    ) -> tuple[str, list[Span]]:
        """The text to tokenize and its weighted spans; raises BadRecord.

        A template that ends the last answer with nothing gets the end token behind it: without, no model would stop.
        """
        if not self.knows_thoughts and any("reasoning_content" in m.extra for m in conversation.messages):
            raise BadRecord(
                "the chat template leaves out the reasoning: use one that knows reasoning_content, or data without it"
            )
        if _is_plain_text(conversation):
            rendered = self._render(conversation)
            return rendered.text, [Span(0, len(rendered.text), 1.0, answer=0)]
        shape = shape_of(conversation)
        if shape is None:
            return self._supervised(self._render(conversation), conversation, loss_on, prompt_loss_weight)
        if len(self._shapes) > _MOST_SHAPES:
            self._shapes.clear()
        known = self._shapes.setdefault((shape, loss_on, prompt_loss_weight), _Known())
        known.seen += 1
        if known.seen == FEW:
            known.skeleton = self._learn(shape, loss_on, prompt_loss_weight)
        filled = known.skeleton and known.skeleton.fill(conversation.messages)
        if filled and known.seen > 2 * FEW and known.seen % CHECKED:
            return filled
        whole = self._supervised(self._render(conversation), conversation, loss_on, prompt_loss_weight)
        assert not filled or filled == whole, f"{self.template.name}: the skeleton of {shape} is wrong"
        return whole

    def _learn(self, shape: Shape, loss_on: str, prompt_loss_weight: float) -> Skeleton | None:
        """What the template writes around messages of this shape, if it writes the same whatever they say."""
        template = compile_template(self.template.text)
        return learn(
            shape,
            lambda conversation: render_opaque(template, conversation, self.special_tokens),
            lambda rendered, conversation: self._supervised(
                rendered, conversation, loss_on, prompt_loss_weight, header_end=_no_skeleton
            ),
        )

    def _supervised(
        self,
        rendered: Rendered,
        conversation: Conversation,
        loss_on: str,
        prompt_loss_weight: float,
        header_end: Callable[[Turn], int] | None = None,
    ) -> tuple[str, list[Span]]:
        """The text, with the end token where the template ends with nothing, and the spans."""
        if self._ends_without_stop(rendered, conversation):
            if not self.eos_token:
                raise ConfigError(
                    f"data.chat_template={self.template.name}: it ends answers with nothing and the tokenizer has no "
                    "end token, so no model would learn to stop; choose chatml, phi3 or llama3"
                )
            rendered = rendered.with_literal(self.eos_token)
        found = supervise(
            rendered,
            conversation,
            stops=self.stops,
            loss_on=loss_on,
            prompt_loss_weight=prompt_loss_weight,
            header_end=header_end or (lambda turn: self._header_end(conversation, rendered, turn)),
            opening_start=lambda turn: self._opening_start(conversation, rendered, turn),
        )
        return rendered.text, found

    def _ends_without_stop(self, rendered: Rendered, conversation: Conversation) -> bool:
        last = find_turns(rendered.runs).get(len(conversation.messages) - 1)
        if last is None or conversation.messages[-1].role != "assistant":
            return False
        return self.stops.find(rendered.text, last.end, len(rendered.text)) is None

    def _opening_start(self, conversation: Conversation, rendered: Rendered, turn: Turn) -> int:
        """Where the model begins to write, at or before the content that `turn` opens with.

        Of an answer whose thoughts the template leaves out (those of earlier turns) it is the content: the model did
        not open it like that, and would learn not to think.
        """
        said = conversation.messages[turn.message].extra
        if any(str(said.get(name) or "").strip() for name in THOUGHTS):
            return turn.start
        if not self.prompt or rendered.text.endswith(self.prompt, 0, turn.start):
            return turn.start
        header = rendered.text[header_start(rendered, turn.message, turn.start) : turn.start]
        return turn.start - len(opening(header, self.prompt))

    def _header_end(self, conversation: Conversation, rendered: Rendered, turn: Turn) -> int:
        """Where the role header ends in front of a turn that opens with reasoning or a function call.

        The header is what the template writes when it asks a model to speak, or puts before a plain answer without the
        opening (there with an empty think block, as the case may be): the longer one that stands here. The rest is the
        model's to write.
        """
        earlier = conversation.messages[: turn.message]
        start = header_start(rendered, turn.message, turn.start)
        asked = self._header(Conversation(earlier, conversation.tools), prompt=True)
        answered = self._header(Conversation((*earlier, Message("assistant", ".")), conversation.tools))
        answered = answered.removesuffix(opening(answered, self.prompt))
        here = rendered.text[start : turn.start]
        fitting = [len(header) for header in (asked, answered) if header and here.startswith(header)]
        if not fitting:
            raise BadRecord(f"cannot tell where the header of message {turn.message + 1} ends in this chat template")
        return start + max(fitting)

    def _header(self, conversation: Conversation, prompt: bool = False) -> str:
        """What the template writes before the last message, or before the model speaks; empty if it refuses."""
        try:
            rendered = self._render(conversation, prompt)
        except BadRecord:
            return ""
        number = len(conversation.messages) - (0 if prompt else 1)
        turn = find_turns(rendered.runs).get(number)
        end = turn.start if turn else len(rendered.text)
        return rendered.text[header_start(rendered, number, end) : end]

    def example(self, frame: TokenizedExample, text: str, spans: list[Span], encoded: Encoded) -> TokenizedExample:
        """`frame` filled with token ids and weights."""
        ids, ranges = encoded
        weights, answers = token_weights(len(ids), ranges, spans), token_answers(ranges, spans)
        if self.bos_to_prepend and not begins_with(text, self.bos_to_prepend):
            ids, weights = np.array([self.tokenizer.bos_token_id, *ids], np.int32), np.concatenate([_ZERO, weights])
            answers = tuple((start + 1, end + 1) for start, end in answers)
        return TokenizedExample(ids, weights, frame.source, frame.id, answers)


_ZERO = np.zeros(1, dtype=np.float32)
_NO_IDS = np.zeros(0, dtype=np.int32)
_NO_WEIGHTS = np.zeros(0, dtype=np.float32)


def _is_plain_text(conversation: Conversation) -> bool:
    return len(conversation.messages) == 1 and conversation.messages[0].role == "text"


_ID = re.compile(r".*:(\d+)(?:\+(\d+))?")


def _located(error: BadRecord, conversation: Conversation) -> BadRecord:
    """The same error with the place of the record, which its id tells."""
    place = _ID.fullmatch(conversation.id)
    line, byte = (int(place[1]), int(place[2] or 0)) if place else (0, 0)
    return BadRecord(error.reason, file=conversation.source, line=line, byte=byte)
