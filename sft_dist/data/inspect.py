"""What the model will learn from an example, made visible: tokens coloured by loss weight, and the learned text.

view = view_example(store.example(7), row=7, tokenizer=tokenizer)
terminal_text(view)          rich text: learned tokens on green, weighted ones on yellow, context dim
html_page([view], title)     the same as one self-contained file
view.as_dict()               the same as JSON
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from sft_dist.data.templates import spans
from sft_dist.types import TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAX_TOKENS_OF_ONE_CHARACTER = 8  # byte-level tokens that are joined before an undecodable piece is shown as it is
_UNDECODED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few that together make a character."""

    text: str
    weight: float  # as a target; 0 = context


@dataclass(frozen=True, slots=True)
class ExampleView:
    """An example ready to be shown."""

    row: int
    id: str
    num_tokens: int
    num_loss_tokens: int
    pieces: tuple[Piece, ...]
    learned: tuple[str, ...]  # decoded text of each supervised span, stop text included

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "row": self.row,
            "id": self.id,
            "num_tokens": self.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "pieces": [[piece.text, piece.weight] for piece in self.pieces],
            "learned": list(self.learned),
        }


def view_example(example: TokenizedExample, *, row: int, tokenizer: PreTrainedTokenizerFast) -> ExampleView:
    """Decode an example token by token. The first token is shown as context: it is never a target."""
    weights = example.loss_weights.copy()
    weights[:1] = 0.0
    return ExampleView(
        row=row,
        id=example.id,
        num_tokens=len(example.input_ids),
        num_loss_tokens=int(np.count_nonzero(weights)),
        pieces=tuple(_pieces(example.input_ids.tolist(), weights.tolist(), tokenizer)),
        learned=tuple(_decode(example.input_ids[start:end].tolist(), tokenizer) for start, end in spans(weights)),
    )


def terminal_text(view: ExampleView) -> Text:
    """The example for a terminal; line ends inside learned text are marked, so that nothing learned is invisible."""
    text = Text()
    for number, piece in enumerate(view.pieces):
        shown = piece.text.replace("\n", "⏎\n") if piece.weight else piece.text
        text.append(shown, style=_terminal_style(piece.weight, number))
    return text


def html_page(views: Iterable[ExampleView], title: str) -> str:
    """One HTML file without outside parts."""
    body = "\n".join(_html_example(view) for view in views)
    return _PAGE.format(title=html.escape(title), body=body)


def _pieces(ids: Sequence[int], weights: Sequence[float], tokenizer: PreTrainedTokenizerFast) -> Iterator[Piece]:
    """Text of each token in its context: what decoding gains when the token is added behind the one before."""
    before: list[int] = []
    current: list[int] = []
    weight = 0.0
    for number, (token, token_weight) in enumerate(zip(ids, weights, strict=True), 1):
        current.append(token)
        weight = max(weight, token_weight)
        text = _decode(before + current, tokenizer)[len(_decode(before, tokenizer)) :]
        undecided = text.endswith(_UNDECODED) and len(current) < _MAX_TOKENS_OF_ONE_CHARACTER
        if undecided and number < len(ids):
            continue
        yield Piece(text, weight)
        before, current, weight = current, [], 0.0


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _terminal_style(weight: float, number: int) -> str:
    """Neighbouring learned tokens differ in shade, so that one sees where a token ends."""
    if weight == 0:
        return "dim"
    shades = ("green3", "spring_green3") if weight == 1 else ("yellow3", "gold3")
    return f"black on {shades[number % 2]}"


def _html_example(view: ExampleView) -> str:
    tokens = "".join(
        f'<span class="{_html_class(piece.weight)}" title="weight {piece.weight:g}">{html.escape(piece.text)}</span>'
        for piece in view.pieces
    )
    learned = "".join(f"<pre>{html.escape(text)}</pre>" for text in view.learned)
    head = f"row {view.row} · {html.escape(view.id)} · {view.num_tokens} tokens, {view.num_loss_tokens} learned"
    return f'<section><h2>{head}</h2><div class="tokens">{tokens}</div><h3>learned text</h3>{learned}</section>'


def _html_class(weight: float) -> str:
    return "context" if weight == 0 else "learned" if weight == 1 else "weighted"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024 }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin-top: 2.5rem }} h3 {{ font-size: .85rem; color: #667 }}
.tokens, pre {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.tokens {{ border: 1px solid #dde; border-radius: 6px; padding: .8rem }}
pre {{ background: #f4f6f5; border-left: 4px solid #2f9e5f; margin: .4rem 0; padding: .4rem .8rem }}
.context {{ color: #778 }} .learned {{ background: #bdebcb }} .weighted {{ background: #fbe7a1 }}
.tokens span {{ box-shadow: inset -1px 0 #fff }}
</style>
<h1>{title}</h1>
<p><span class="learned">learned</span> · <span class="weighted">learned with a weight other than 1</span> ·
<span class="context">context</span>. Point at a token to see its weight.</p>
{body}
</html>
"""
