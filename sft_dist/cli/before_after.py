"""Two tables for the terminal: exact answers by skill, and answers of the base and the tuned model side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sft_dist.observe.answers import Score

NUM_SHOWN = 6
BAR_WIDTH = 20
LONGEST_BASE_ANSWER = 60  # characters; an untrained model talks until it is stopped


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out question with the answers before and after."""

    skill: str
    question: str  # the conversation up to the answer, one line per turn
    expected: str
    base: str
    tuned: str


def skills_table(scores: Sequence[Score]) -> Table:
    """One row per skill, all of them together last."""
    table = Table(title="exact match on held-out inputs", title_justify="left", box=None, pad_edge=False)
    table.add_column("skill")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("", min_width=BAR_WIDTH)  # a title wider than its table would be folded
    for score in [*scores[1:], *scores[:1]]:
        style = "bold" if score.skill == "all" else ""
        share = score.after or 0.0
        bar = Text("━" * round(share * BAR_WIDTH), style="green" if share >= 0.9 else "yellow")
        table.add_row(score.skill, _percent(score.before), _percent(score.after), bar, style=style)
    return table


def answers_table(pairs: Sequence[Pair]) -> Table:
    """Each pair's question, expected answer, and the two answers."""
    table = Table(title="held-out questions", title_justify="left", show_lines=True)
    for name in ("instruction", "expected", "base", "tuned"):
        table.add_column(name, overflow="fold")
    for pair in pairs:
        base = pair.base if len(pair.base) <= LONGEST_BASE_ANSWER else pair.base[:LONGEST_BASE_ANSWER] + " ..."
        style = "green" if pair.tuned == pair.expected else "red"
        table.add_row(Text(pair.question), Text(pair.expected), Text(base, "dim"), Text(pair.tuned, style))
    return table


def read_pairs(records: Sequence[dict[str, Any]], num: int = NUM_SHOWN) -> list[Pair]:
    """One pair each of `num` skills spread over all, whether the answers are right or not.

    `records` are the lines of exact_match.jsonl; questions and skills are read from the data they name.
    """
    before = {record["id"]: record["answer"] for record in records if record["phase"] == "before"}
    after = [record for record in records if record["phase"] == "after" and record["id"] in before]
    sources = _source_records([record["id"] for record in after])
    first_of: dict[str, Pair] = {}
    for record, source in zip(after, sources, strict=True):
        question, skill = _question(source["messages"]), source["skill"]
        pair = Pair(skill, question, record["reference"], before[record["id"]], record["answer"])
        first_of.setdefault(skill, pair)
    skills = sorted(first_of)
    count = min(num, len(skills))
    return [first_of[skills[index * len(skills) // count]] for index in range(count)]


def _source_records(ids: Sequence[str]) -> list[dict[str, Any]]:
    """The records that `file:line` names, in order."""
    places = [record_id.rpartition(":") for record_id in ids]
    lines = {file: Path(file).read_text(encoding="utf-8").split("\n") for file in {file for file, _, _ in places}}
    return [json.loads(lines[file][int(line) - 1]) for file, _, line in places]


def _question(messages: Sequence[dict[str, str]]) -> str:
    """The user's only turn, or all turns before the answer with who spoke."""
    *asked, _ = messages
    if len(asked) == 1:
        return asked[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in asked)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
