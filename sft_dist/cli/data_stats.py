"""How `sft-dist data stats` writes the preparation's report and the survey to a terminal, in 80 columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os.path import basename
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from sft_dist.data.inspect import visible

if TYPE_CHECKING:
    from rich.console import Console

    from sft_dist.data.report import PrepareReport
    from sft_dist.data.survey import Duplicates, Finding, Place, Survey

_MAX_LISTED = 20
_MOST_CLUSTERS, _MOST_PLACES = 5, 3
_BAR = 40  # columns


def show_report(console: Console, report: PrepareReport) -> None:
    """Counts by source, sizes by split, lengths, and what was left out."""
    for source in report.sources:
        _say(console, f"{source.describe()}, {source.supervised_share:.1%} supervised")
    console.print(_split_table(report))
    for name, split in report.splits.items():
        _title(console, f"lengths of {name}, in tokens")
        for line in bars(split.histogram):
            _say(console, line)
        _list(console, f"longest of {name}", [f"{one['tokens']:,} tokens: {one['id']}" for one in split.longest])
    rejects = (f"{bad['file']}:{bad['line']} (byte {bad['byte']}): {bad['reason']}" for bad in report.rejects)
    _list(console, "bad records", list(rejects))
    _list(console, "dropped", [f"{row['id']}: {row['reason']}" for row in report.dropped])
    _list(console, "notices", report.told())


def show_survey(console: Console, survey: Survey) -> None:
    """Coverage, quality and duplicates; every finding names rows that `data inspect --row` shows."""
    _title(
        console,
        f"tasks: {survey.num_tasks:,} different verb-object pairs in {survey.num_instructions:,} instructions "
        f"({survey.num_without_task:,} without a verb by the rule)",
    )
    _counted(console, {f"{verb} {what}".strip(): count for verb, what, count in survey.tasks})
    for what in ("question, tokens", "answer, tokens"):
        if what in survey.lengths:
            _title(console, f"length of {what.replace(', ', ' in ')}")
            for line in bars(survey.lengths[what]):
                _say(console, line)
    for title, counts in (
        ("scripts", survey.scripts),
        ("languages (of a sample)", survey.languages),
        ("learned answers per conversation", survey.answers_per_conversation),
    ):
        _title(console, title)
        _say(console, "  " + _few(counts))
    _title(console, "worth a look (nothing was dropped)")
    for finding in survey.findings.values():
        _finding(console, finding)
    _duplicates(console, "exact duplicates", survey.exact)
    _duplicates(console, "near-duplicates", survey.near)
    _duplicates(console, "the same question, whatever the answer", survey.questions)
    for leak in survey.leaks:
        _title(console, f"{leak.split} against train")
        _say(
            console,
            f"  of {leak.rows:,} rows: {leak.exact:,} exact and {leak.near:,} near-duplicates, "
            f"{leak.same_question:,} with a question that is also trained",
        )
        _places(console, leak.places)
    _list(console, "notices of the survey", survey.notices)


def as_json(report: PrepareReport, survey: Survey) -> str:
    return json.dumps(report.shown() | {"survey": survey.as_dict()}, indent=2, ensure_ascii=False)


def bars(histogram: dict[str, list[int]], width: int = _BAR) -> list[str]:
    """One line per bin from the first to the last used one, drawn with eighths of a block."""
    edges, counts = histogram["edges"], histogram["counts"]
    used = [number for number, count in enumerate(counts) if count]
    lines = []
    for number in range(used[0], used[-1] + 1):
        bar = _bar(counts[number], max(counts), width)
        lines.append(f"{edges[number]:>7,} to {edges[number + 1] - 1:>7,} {counts[number]:>9,}  {bar}".rstrip())
    return lines


def _bar(count: int, most: int, width: int) -> str:
    eighths = round(8 * width * count / most)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _split_table(report: PrepareReport) -> Table:
    """A column for each split: there are three at most, so that the numbers of large ones have room."""
    table = Table(
        box=box.SIMPLE, title=f"\nrendered with {report.template}, data.seq_len={report.seq_len}", title_justify="left"
    )
    table.add_column("")
    for name in report.splits:
        table.add_column(name, justify="right")
    splits = report.splits.values()
    table.add_row("examples", *(f"{split.examples:,}" for split in splits))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("supervised", *(f"{split.supervised_share:.1%}" for split in splits))
    for key in ("min", "mean", "p50", "p90", "p99", "max"):
        table.add_row(f"length, {key}", *(f"{split.lengths[key]:,.0f}" for split in splits))
    return table


def _counted(console: Console, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        _say(console, f"  {name[:24]:<24} {count:>7,}  {_bar(count, max(counts.values()), _BAR)}")


def _few(counts: dict[Any, int]) -> str:
    """The most frequent ones with their share."""
    total = sum(counts.values())
    shown = [f"{name} {count:,} ({count / total:.1%})" for name, count in list(counts.items())[:8]]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f", {rest} others" if rest > 0 else "")


def _finding(console: Console, finding: Finding) -> None:
    _say(console, f"  {finding.count:>7,}  {finding.about}")
    _places(console, finding.places)


def _duplicates(console: Console, title: str, found: Duplicates) -> None:
    _title(console, f"{title}: {found.num_rows:,} rows in {found.num_clusters:,} clusters")
    for cluster in found.clusters[:_MOST_CLUSTERS]:
        _say(console, f"  {' = '.join(f'{place.split} {place.row}' for place in cluster)}  {cluster[0].text}", cut=True)


def _places(console: Console, places: Sequence[Place]) -> None:
    for place in places[:_MOST_PLACES]:
        _say(console, f"{'':11}{place.split} row {place.row} · {_short(place.id)} · {place.text}", cut=True)


def _short(place: str) -> str:
    """An id without the folders of its file; the slashes behind the line count the pieces of a conversation."""
    file, line, behind = place.rpartition(":")
    return f"{basename(file)}{line}{behind}"


def _title(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _say(console: Console, text: str, cut: bool = False) -> None:
    """One line as it is, or cut at the terminal's width."""
    if cut:
        console.print(Text(visible(text)), no_wrap=True, overflow="ellipsis", crop=True)
    else:
        console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    _title(console, title)
    for line in lines[:_MAX_LISTED]:
        _say(console, f"  {line}")
    if len(lines) > _MAX_LISTED:
        _say(console, f"  ... and {len(lines) - _MAX_LISTED:,} more (--json lists all)")
