"""How `sft-dist data inspect` writes examples and packs to a terminal: in colour, or with brackets where there is none.

Everything wraps at the terminal's width, 80 columns where there is no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sft_dist.data.inspect import LEGEND, ExampleView, PackView, terminal_text, view_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft_dist.data.stream_store import AnyStore

_BAR = 60  # columns of a full pack
_MOST_PACKS = 64  # of a step


def views_of(store: AnyStore, rows: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[ExampleView]:
    return [view_example(store.example(row), row=row, tokenizer=tokenizer) for row in rows]


def has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def show_examples(console: Console, views: Sequence[ExampleView]) -> None:
    """Each example under its name: its tokens, then what is learned as text."""
    marks = not has_colour(console)
    if marks and views:
        console.print(LEGEND, markup=False, highlight=False)
    for view in views:
        console.rule(style="dim")
        console.print(Text(view.title, style="bold", overflow="fold"))
        console.print(terminal_text(view, marks))
        for text in view.learned:
            console.print(Text.assemble(("\nlearned  ", "bold green"), repr(text), overflow="fold"))
    console.rule(style="dim")


def show_packs(console: Console, packs: Sequence[PackView]) -> None:
    """Each pack as a bar of its documents, with the rows in it and the token where each begins."""
    for pack in packs[:_MOST_PACKS]:
        console.print(Text(pack.title, style="bold"))
        console.print(Text("  " + bar_of(pack), style="cyan"))
        documents = "  ".join(f"{row}@{start}" for row, start in zip(pack.rows, pack.cu_seqlens, strict=False))
        console.print(Text(f"  row@token  {documents}  end@{pack.cu_seqlens[-1]}"))
    if len(packs) > _MOST_PACKS:
        console.print(f"... and {len(packs) - _MOST_PACKS:,} more packs (--json lists all)", highlight=False)


def bar_of(pack: PackView) -> str:
    """`├──────┼───┤···`: documents between marks, padding as dots."""
    full = max(pack.seq_len, pack.cu_seqlens[-1])
    edges = [edge * _BAR // full for edge in pack.cu_seqlens]
    line = ["─" if at < edges[-1] else "·" for at in range(_BAR + 1)]
    for edge in edges[1:-1]:
        line[edge] = "┼"
    line[edges[-1]] = "┤"
    line[0] = "├"
    return "".join(line)
