"""Signs that an answer deserves a look. They are signs, not verdicts: nothing is changed or dropped because of them.

    signs(exchange)          names out of CHECKS, in their order; () for an answer without any
    repetition(text)         share of word 4-grams that came before, 0 to 1

Thresholds are those of published filters where there are some: repeated n-grams after Rae et al., 2021 (Gopher, table
A1), answers that only repeat the request after Wang et al., 2022 (Self-Instruct, section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sft_dist.data.exchanges import Exchange
from sft_dist.data.refusals import is_refusal

_SHORT = 3  # characters
_REPEATED_SHARE = 0.5
_FEWEST_GRAMS = 20  # fewer repeat by accident
_GRAM_WORDS, _GRAM_LETTERS = 4, 10
_ECHO = 20  # characters an echo has at least; shorter ones are names and numbers
_LONG_ENOUGH_TO_END = 200  # characters: shorter answers are often phrases without a full stop

_ENDS = re.compile(r"""#\w+\s*$|[.!?…:;。！？；：।؟۔)\]}>"'”’»」』）】`*_|~\d%$€#=/\\-]\W*$""")
_MARKUP = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|^#+ ?(?:Instruction|Response|Input):|^(?:Human|Assistant|USER|ASSISTANT):", re.M
)
_ODD = re.compile(
    "[\ufffd\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]"  # replaced, control, private use
    "|Ã[\x80-\xbf¡-¿]|Â[\xa0-\xbf]|â€[\x90-\x9f™œ“”˜¦]|[ÐÑ][\x80-\xbf°±²³][ÐÑ]"  # UTF-8 read as Latin-1 or cp1252
)


def signs(exchange: Exchange) -> tuple[str, ...]:
    """The checks that this answer is an example of."""
    return tuple(name for name, (_, is_so) in CHECKS.items() if is_so(exchange))


def repetition(text: str) -> float:
    """Share of n-grams that repeat an earlier one: 4 words, or 10 characters where words are not spaced."""
    words = text.split()
    units: list[str] | str = words if len(text) < 15 * max(len(words), 1) else "".join(words)
    size = _GRAM_WORDS if isinstance(units, list) else _GRAM_LETTERS
    grams = [tuple(units[at : at + size]) for at in range(len(units) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= _FEWEST_GRAMS else 0.0


def _is_short(exchange: Exchange) -> bool:
    return len(exchange.answer) <= _SHORT


def _echoes(exchange: Exchange) -> bool:
    """The answer stands in the question and makes up at least half of it."""
    asked, said = (" ".join(text.casefold().split()) for text in (exchange.question, exchange.answer))
    return len(said) >= max(_ECHO, len(asked) / 2) and said in asked


def _is_repetitive(exchange: Exchange) -> bool:
    return repetition(exchange.answer) >= _REPEATED_SHARE


def _is_cut_off(exchange: Exchange) -> bool:
    """No stop text behind it, a code block left open, or a long text that ends inside a sentence.

    A last line much shorter than the text is an item of a list, a verse or a signature, and needs no full stop.
    """
    answer = exchange.answer
    if not exchange.stopped or answer.count("```") % 2:
        return True
    return len(answer) >= _LONG_ENOUGH_TO_END and "\n" not in answer and not _ENDS.search(answer)


def _has_odd_characters(exchange: Exchange) -> bool:
    return any(_ODD.search(text) for text in (exchange.question, exchange.answer))


def _has_markup(exchange: Exchange) -> bool:
    return _MARKUP.search(exchange.answer) is not None


def _refuses(exchange: Exchange) -> bool:
    return is_refusal(exchange.answer)


CHECKS: dict[str, tuple[str, Callable[[Exchange], bool]]] = {
    "short": (f"answers of at most {_SHORT} characters (right for labels and numbers)", _is_short),
    "echo": ("answers that only repeat the question", _echoes),
    "repetitive": (f"answers in which {_REPEATED_SHARE:.0%} of the 4-grams repeat", _is_repetitive),
    "refusal": ("answers that begin like a refusal", _refuses),
    "cut_off": ("answers that look cut off", _is_cut_off),
    "odd_characters": ("control or replacement characters, wrongly decoded text", _has_odd_characters),
    "markup": ("chat markup of a template inside the answer", _has_markup),
}
