"""What the model will learn from an example, made visible: tokens coloured by loss weight, and the learned text.

    view = view_example(store.example(7), row=7, tokenizer=tokenizer)
    terminal_text(view)                 rich text: learned tokens on green, weighted ones on yellow, context dim
    terminal_text(view, marks=True)     the same to be read without colour: ⟦learned⟧, ⟨0.5 weighted⟩
    html_page([view], title)            one self-contained file
    view.as_dict()                      the same as JSON

    short_line(view)                    where it begins to be learned, in one line
    sample_rows(len(store), 3, seed)                     some rows, always the same
    find_rows(store, tokenizer, source=..., grep=...)    the rows to look at
    view_pack(plan.step(3), 0, 1, ...)                   a pack of a planned step: the documents that share a sequence

`▶1` marks where the first answer begins, in every form.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from os.path import basename
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from sft_dist.data.permutation import derive_key, permute
from sft_dist.data.stream_store import AnyStore, Lengths
from sft_dist.data.templates import spans
from sft_dist.types import StepPlan, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAX_TOKENS_OF_ONE_CHARACTER = 8  # byte-level tokens that are joined before an undecodable piece is shown as it is
_UNDECODED = "\ufffd"
_CONTROL_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    127: "␡"
}
_CONTROL_PICTURES |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_ROWS_AT_ONCE = 1000  # decoded together while searching
ANSWER_MARK = "▶"
LEGEND = f"{ANSWER_MARK}1 answer 1 begins · ⟦learned⟧ · ⟨0.5 with that weight⟩ · ⏎ learned line end"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few that together make a character."""

    text: str
    weight: float  # as a target; 0 = context
    answer: int = 0  # the answer that begins here, counted from 1; 0: none does


@dataclass(frozen=True, slots=True)
class ExampleView:
    """An example ready to be shown."""

    row: int
    id: str
    source: str
    num_tokens: int
    num_loss_tokens: int
    pieces: tuple[Piece, ...]
    answers: tuple[tuple[int, int], ...]  # token ranges [start, end)
    learned: tuple[str, ...]  # decoded text of each supervised span, stop text included

    @property
    def title(self) -> str:
        """One line, short enough for a terminal: the file without its folders."""
        place = basename(self.source) + self.id.removeprefix(self.source)
        return f"row {self.row} · {place} · {self.num_tokens} tokens, {self.num_loss_tokens} learned"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "row": self.row,
            "id": self.id,
            "source": self.source,
            "num_tokens": self.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "answers": [list(edges) for edges in self.answers],
            "pieces": [[piece.text, piece.weight] for piece in self.pieces],
            "learned": list(self.learned),
        }


@dataclass(frozen=True, slots=True)
class PackView:
    """Documents that share one sequence; attention and labels never cross from one to the next."""

    step: int
    micro_batch: int
    number: int
    seq_len: int
    num_loss_tokens: int
    lengths: tuple[int, ...]  # tokens of each document, in order
    rows: tuple[int, ...]

    @property
    def cu_seqlens(self) -> list[int]:
        """Where documents begin and the last one ends: what attention kernels are given."""
        return list(accumulate(self.lengths, initial=0))

    @property
    def name(self) -> str:
        """As `--pack` takes it."""
        return f"{self.step}:{self.micro_batch}:{self.number}"

    @property
    def title(self) -> str:
        tokens = f"{sum(self.lengths)} of {self.seq_len} tokens"
        return f"pack {self.name} · {len(self.rows)} documents, {tokens}, {self.num_loss_tokens} learned"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "pack": self.name,
            "rows": list(self.rows),
            "lengths": list(self.lengths),
            "cu_seqlens": self.cu_seqlens,
            "seq_len": self.seq_len,
            "num_loss_tokens": self.num_loss_tokens,
        }


def view_example(example: TokenizedExample, *, row: int, tokenizer: PreTrainedTokenizerFast) -> ExampleView:
    """Decode an example token by token. The first token is shown as context: it is never a target."""
    weights = example.loss_weights.copy()
    weights[:1] = 0.0
    begins = {start: number for number, (start, _) in enumerate(example.answers, 1)}
    return ExampleView(
        row=row,
        id=example.id,
        source=example.source,
        num_tokens=len(example.input_ids),
        num_loss_tokens=int(np.count_nonzero(weights)),
        pieces=tuple(_pieces(example.input_ids.tolist(), weights.tolist(), begins, tokenizer)),
        answers=example.answers,
        learned=tuple(_decode(example.input_ids[start:end].tolist(), tokenizer) for start, end in spans(weights)),
    )


def view_packs(plan: StepPlan, lengths: np.ndarray | Lengths, seq_len: int) -> list[PackView]:
    """All packs of a step, in the order of its micro-batches, counted from 0. `lengths`: of the store's examples."""
    return [
        PackView(
            step=plan.step,
            micro_batch=at,
            number=number,
            seq_len=seq_len,
            num_loss_tokens=pack.num_loss_tokens,
            lengths=tuple(int(lengths[row]) for row in pack.example_ids),
            rows=pack.example_ids,
        )
        for at, micro_batch in enumerate(plan.micro_batches)
        for number, pack in enumerate(micro_batch)
    ]


def sample_rows(num_rows: int, n: int, seed: int) -> list[int]:
    """`n` different rows, the same for the same seed."""
    return permute(np.arange(min(n, num_rows)), num_rows, derive_key("inspect", seed)).tolist()


def find_rows(
    store: AnyStore, tokenizer: PreTrainedTokenizerFast, *, source: str | None = None, grep: str | None = None
) -> Iterator[int]:
    """Rows in order whose file has `source` in its name and whose text has `grep` in it, case aside.

    Reads the store a thousand rows at a time and only as far as it is asked.
    """
    for first in range(0, len(store), _ROWS_AT_ONCE):
        rows = range(first, min(first + _ROWS_AT_ONCE, len(store)))
        chosen = [row for row in rows if source is None or source in store.example(row).source]
        if grep is not None and chosen:
            texts = tokenizer.batch_decode(
                [store.token_ids(row).tolist() for row in chosen],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            chosen = [row for row, text in zip(chosen, texts, strict=True) if grep.casefold() in text.casefold()]
        yield from chosen


def visible(text: str) -> str:
    """The text with pictures of its control characters: data must not steer a terminal."""
    return text.translate(_CONTROL_PICTURES)


def terminal_text(view: ExampleView, marks: bool = False) -> Text:
    """The example for a terminal; line ends inside learned text are marked, so that nothing learned is invisible.

    `marks`: brackets around learned text, for terminals and files without colour.
    """
    text = Text(overflow="fold")
    number = 0
    for weight, run in groupby(view.pieces, lambda piece: piece.weight):
        for at, piece in enumerate(run):
            if piece.answer:
                text.append(f"{ANSWER_MARK}{piece.answer} ", style="bold cyan")
            if marks and weight and not at:
                text.append("⟦" if weight == 1 else f"⟨{weight:g} ")
            text.append(_shown(piece), style=_terminal_style(weight, number))
            number += 1
        if marks and weight:
            text.append("⟧" if weight == 1 else "⟩")
    return text


def short_line(view: ExampleView) -> str:
    """The first learned text in its brackets, with what stands before it; both cut, at most 130 columns in all."""
    before = "".join(piece.text for piece in takewhile(lambda piece: not piece.weight, view.pieces))
    more = f" and {len(view.learned) - 1} more" if view.learned[1:] else ""
    return f"row {view.row}  {_middle_cut(before, 0, 56)}⟦{_middle_cut(view.learned[0], 30, 18)}⟧{more}"


def html_page(views: Iterable[ExampleView], title: str, packs: Sequence[PackView] = ()) -> str:
    """One HTML file without outside parts: packs as bars of their documents, then the examples."""
    body = "\n".join([*map(_html_pack, packs), *map(_html_example, views)])
    return _PAGE.format(title=html.escape(title), body=body)


def _pieces(
    ids: Sequence[int], weights: Sequence[float], begins: dict[int, int], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Piece]:
    """Text of each token in its context: what decoding gains when the token is added behind the one before."""
    before: list[int] = []
    current: list[int] = []
    weight, answer = 0.0, 0
    for number, (token, token_weight) in enumerate(zip(ids, weights, strict=True)):
        current.append(token)
        weight, answer = max(weight, token_weight), answer or begins.get(number, 0)
        text = _decode(before + current, tokenizer)[len(_decode(before, tokenizer)) :]
        undecided = text.endswith(_UNDECODED) and len(current) < _MAX_TOKENS_OF_ONE_CHARACTER
        if undecided and number + 1 < len(ids):
            continue
        yield Piece(text, weight, answer)
        before, current, weight, answer = current, [], 0.0, 0


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _middle_cut(text: str, head: int, tail: int) -> str:
    """On one line; of a longer text its first `head` and last `tail` characters."""
    flat = visible(text).replace("\n", "⏎").replace("\t", " ")
    return flat if len(flat) <= head + tail + 1 else f"{flat[:head]}…{flat[-tail:]}"


def _shown(piece: Piece) -> str:
    """Its text, in which a learned line end can be seen."""
    text = visible(piece.text)
    return text.replace("\n", "⏎\n") if piece.weight else text


def _terminal_style(weight: float, number: int) -> str:
    """Neighbouring learned tokens differ in shade, so that one sees where a token ends."""
    if weight == 0:
        return "dim"
    shades = ("green3", "spring_green3") if weight == 1 else ("yellow3", "gold3")
    return f"black on {shades[number % 2]}"


def _html_example(view: ExampleView) -> str:
    learned = "".join(f"<pre>{html.escape(text)}</pre>" for text in view.learned)
    source = f'<p class="source">{html.escape(view.id)}</p>'
    tokens = f'<div class="tokens">{"".join(map(_html_piece, view.pieces))}</div>'
    head = f'<h2 id="row{view.row}">{html.escape(view.title)}</h2>'
    return f"<section>{head}{source}{tokens}<h3>learned text</h3>{learned}</section>"


def _html_piece(piece: Piece) -> str:
    mark = f"<em>{ANSWER_MARK}{piece.answer}</em>" if piece.answer else ""
    text = html.escape(_shown(piece))
    return f'{mark}<span class="{_html_class(piece.weight)}" title="weight {piece.weight:g}">{text}</span>'


def _html_pack(pack: PackView) -> str:
    """A bar as wide as the sequence, one link per document."""
    documents = "".join(
        f'<a href="#row{row}" style="flex:{length}" title="row {row}: tokens {start} to {start + length - 1}">{row}</a>'
        for row, length, start in zip(pack.rows, pack.lengths, pack.cu_seqlens, strict=False)
    )
    rest = f'<i style="flex:{max(pack.seq_len - sum(pack.lengths), 0)}"></i>'
    return f'<h3>{html.escape(pack.title)}</h3><div class="pack">{documents}{rest}</div>'


def _html_class(weight: float) -> str:
    return "context" if weight == 0 else "learned" if weight == 1 else "weighted"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024 }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 2.5rem 0 0 }} h3 {{ font-size: .85rem; color: #667 }}
.source {{ font-size: .8rem; color: #667; margin: 0 0 .5rem; overflow-wrap: anywhere }}
.tokens, pre {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.tokens {{ border: 1px solid #dde; border-radius: 6px; padding: .8rem }}
em {{ color: #2563a8; font-style: normal; font-weight: 600 }}
pre {{ background: #f4f6f5; border-left: 4px solid #2f9e5f; margin: .4rem 0; padding: .4rem .8rem }}
.context {{ color: #667 }} .learned {{ background: #bdebcb }} .weighted {{ background: #fbe7a1 }}
.tokens span {{ box-shadow: inset -1px 0 #fff }}
.pack {{ display: flex; background: #eee; border-radius: 4px; overflow: hidden; font-size: .75rem }}
.pack a {{ background: #bcd3ea; border-right: 2px solid #fff; text-align: center; overflow: hidden; min-width: 0;
  color: #1c2024; text-decoration: none }}
</style>
<h1>{title}</h1>
<p><span class="learned">learned</span> · <span class="weighted">learned with a weight other than 1</span> ·
<span class="context">context</span> · <em>▶1</em> the first answer begins. Point at a token to see its weight.</p>
{body}
</html>
"""
