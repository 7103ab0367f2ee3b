"""Stored tokens back into what was asked and what is answered, so that text can be judged whatever file it came from.

    frame = find_frame(template, tokenizer)                    what the template writes around a user's words
    exchanges(examples, tokenizer, frame)                      one tuple of Exchange per example

An answer is a learned range of tokens without its stop text; the question is what stands between it and the answer
before. Templates add role headers and preambles to a question. What they add is found by rendering a conversation of
four known words and comparing what stands around them:

    lead A close B next C close D          opening = what `lead` and `next` end with alike: "<|im_start|>user\\n"
                                           closing = what both `close` begin with alike: "<|im_end|>\\n<|im_start|>..."

The question is then the text behind the last opening, up to the last closing. Where no opening stands (a tool's
result) nobody asked: `asked` is False. A template that cannot be probed gives no frame, and questions are shown whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from sft_dist.data.templates import ChatTemplate, spans
from sft_dist.errors import BadRecord
from sft_dist.types import Conversation, Message, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBES = ("one", "two", "three", "four")
_ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class Frame:
    """Literals of a template, without the white space at their edges; any may be empty."""

    opening: str  # before a user's words
    closing: str  # between them and the answer
    stops: tuple[str, ...]  # behind an answer


@dataclass(frozen=True, slots=True)
class Exchange:
    """One learned answer and what led to it."""

    question: str
    answer: str
    num_question_tokens: int  # template included
    num_answer_tokens: int  # stop included
    asked: bool = True  # by a user; False: by a tool, or by nobody
    stopped: bool = True  # the answer ends with a stop text


def find_frame(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> Frame | None:
    """The frame of `template` as this tokenizer decodes it; None when it refuses the probe or hides its words."""
    messages = tuple(Message(_ROLES[number % 2], word) for number, word in enumerate(_PROBES))
    bound = template.bind(tokenizer)
    try:
        text = template.render(
            Conversation(messages), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        ).text
    except BadRecord:
        return None
    decoded = _decode([tokenizer.encode(text, add_special_tokens=False)], tokenizer)[0]
    parts = re.split("|".join(rf"\b{word}\b" for word in _PROBES), decoded)
    if len(parts) != len(_PROBES) + 1:
        return None
    lead, close, following, last_close, _ = parts
    opening = _common_start(lead[::-1], following[::-1])[::-1]
    stops = sorted({*bound.stop_ids, bound.eos_token} - {""}, key=len, reverse=True)
    return Frame(opening.strip(), _common_start(close, last_close).strip(), tuple(stops))


def exchanges(
    examples: Iterable[TokenizedExample], tokenizer: PreTrainedTokenizerFast, frame: Frame | None
) -> list[tuple[Exchange, ...]]:
    """The exchanges of each example, in order. All texts are decoded in one call, which is several times faster."""
    given = list(examples)
    ranges = [example.answers or tuple(spans(example.loss_weights)) for example in given]
    pieces = [piece for example, answers in zip(given, ranges, strict=True) for piece in _pieces(example, answers)]
    texts = iter(zip(_decode(pieces, tokenizer), map(len, pieces), strict=True))
    return [tuple(_exchange(*next(texts), *next(texts), frame) for _ in answers) for answers in ranges]


def text_of(said: Iterable[Exchange]) -> str:
    """All that is said in an example, without the template: what two examples are compared by."""
    return "\n".join(f"{one.question}\n{one.answer}" for one in said)


def _common_start(one: str, other: str) -> str:
    equal = takewhile(lambda letters: letters[0] == letters[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in equal)


def _pieces(example: TokenizedExample, answers: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Tokens of question, answer, question, answer, ..."""
    before = 0
    for start, end in answers:
        yield example.input_ids[before:start].tolist()
        yield example.input_ids[start:end].tolist()
        before = end


def _exchange(question: str, num_question: int, answer: str, num_answer: int, frame: Frame | None) -> Exchange:
    if frame is None:
        return Exchange(question.strip(), answer.strip(), num_question, num_answer, asked=bool(question))
    asked = frame.opening in question and bool(question)
    words = question.rpartition(frame.opening)[2] if asked and frame.opening else question
    if frame.closing and frame.closing in words:
        words = words.rpartition(frame.closing)[0]
    said = answer.rstrip()
    stop = next((stop for stop in frame.stops if said.endswith(stop.strip())), "")
    return Exchange(
        words.strip(), said.removesuffix(stop.strip()).strip(), num_question, num_answer, asked, stopped=bool(stop)
    )


def _decode(pieces: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    if not pieces:
        return []  # batch_decode takes an empty list for one empty text
    texts: list[str] = tokenizer.batch_decode(pieces, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts
