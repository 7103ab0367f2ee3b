"""RUN_DIR/report.html: one page that explains a run, without outside parts. The pictures also lie in RUN_DIR/report/.

    what is read                              what the page shows of it
    header.json, fingerprint.json             facts of the run, certificate, digests, versions
    summary.json, logs/attempt_*/             final figures, attempts and how each ended
    metrics.jsonl                             curves: loss, validation, learning rate, gradient norm, throughput
    prepare_report.json                       sources, splits, what was dropped
    exact_match.jsonl, samples.jsonl          exact answers by skill, samples before and after
    config.yaml                               the resolved recipe

Any file may be missing: the run was stopped, or is still running. The page then says so. Texts of data and models are
escaped by the template engine, all of them, always.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sft_dist.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_HANG,
    EXIT_LOCKED,
    EXIT_NONFINITE,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USAGE,
    StorageError,
)
from sft_dist.observe.answers import compare_samples, scores
from sft_dist.observe.charts import draw_all
from sft_dist.observe.metrics import read_metrics
from sft_dist.observe.run_files import read_json, read_lines

TEMPLATE = Path(__file__).with_name("report.html")
READ_FILES = (
    "config.yaml",
    "fingerprint.json",
    "prepare_report.json",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
)
MAX_SAMPLES = 24
MAX_LISTED = 20  # dropped rows and rejects
ENDINGS = {
    EXIT_DONE: "finished",
    EXIT_USAGE: "refused: configuration",
    EXIT_DATA: "data or checkpoint unusable",
    EXIT_NONFINITE: "loss or gradient norm not finite",
    EXIT_HANG: "hang",
    EXIT_LOCKED: "folder held by another job",
    EXIT_STORAGE: "storage failed",
    EXIT_STOPPED: "stopped on request with a checkpoint",
}

Line = dict[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write the page from the files of `run_dir` and return its path. Raises StorageError when it cannot be written."""
    lines, prepare_report = read_metrics(run_dir), read_json(run_dir / "prepare_report.json")
    pictures = draw_all(lines, prepare_report)
    page = render(run_dir, lines, prepare_report, pictures)
    path = run_dir / "report.html"
    try:
        (run_dir / "report").mkdir(exist_ok=True)
        for name, png in pictures.items():
            (run_dir / "report" / f"{name}.png").write_bytes(png)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space or make it writable") from error
    return path


def render(
    run_dir: Path, lines: Sequence[Line], prepare_report: dict[str, Any] | None, pictures: dict[str, bytes]
) -> str:
    """The page's HTML."""
    records = read_lines(run_dir / "samples.jsonl")
    samples = compare_samples(records)
    fingerprint = read_json(run_dir / "fingerprint.json") or {}
    config = run_dir / "config.yaml"
    summary = read_json(run_dir / "summary.json") or {}
    attempts = read_attempts(run_dir, lines)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "duration": duration}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run_dir.resolve().name,
        folder=str(run_dir),
        status=status(summary, attempts, lines),
        missing=[name for name in READ_FILES if not (run_dir / name).exists()],
        figures=figures(summary, lines),
        facts=facts(read_json(run_dir / "header.json"), fingerprint),
        attempts=attempts,
        data=prepare_report,
        mix=mix(lines),
        scores=scores(read_lines(run_dir / "exact_match.jsonl")),
        samples=samples[:MAX_SAMPLES],
        num_samples=len(samples),
        sample_steps=sorted({record["step"] for record in records}),
        fingerprint=fingerprint,
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        pictures={key: base64.b64encode(png).decode() for key, png in pictures.items()},
        max_listed=MAX_LISTED,
    )


def status(summary: dict[str, Any], attempts: Sequence[dict[str, Any]], lines: Sequence[Line]) -> str:
    """How the run stands, in a few words."""
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    if summary.get("finished"):
        return f"finished after {summary.get('steps', steps[-1] if steps else 0):,} steps"
    where = f"after step {steps[-1]:,}" if steps else "before the first step"
    ending = attempts[-1]["ending"] if attempts else "no attempt is recorded"
    return f"not finished, {where}: {ending}"


def figures(summary: dict[str, Any], lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """(name, value, value before) of the large figures; from the metrics where the run has no summary yet."""
    steps = [line for line in lines if line["kind"] == "step"]
    evals = [line["eval_loss"] for line in lines if line["kind"] == "eval"]
    found: list[tuple[str, str, str]] = []
    if "exact_match_after" in summary:
        before = summary.get("exact_match_before")
        found.append(("exact match", percent(summary["exact_match_after"]), percent(before)))
    if evals:
        found.append(("validation loss", number(evals[-1]), number(evals[0])))
    if steps:
        seconds, tokens = (sum(line[key] for line in steps) for key in ("step_seconds", "num_tokens"))
        found += [
            ("training loss", number(steps[-1]["loss"]), number(steps[0]["loss"])),
            ("optimizer steps", f"{steps[-1]['step']:,}", ""),
            ("tokens trained", f"{tokens:,}", ""),
            ("tokens per second", number(tokens / seconds if seconds else math.nan), ""),
            ("time in steps", duration(seconds), ""),
            ("peak memory", f"{max(line['peak_memory_gib'] for line in steps):.2f} GiB", ""),
        ]
    return found


def mix(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """What each source gave to the training and what was measured on its held-out part; empty with one source."""
    tokens: Counter[str] = Counter()
    learned: Counter[str] = Counter()
    for line in lines:
        tokens.update(line.get("tokens_by_source") or {})
        learned.update(line.get("loss_tokens_by_source") or {})
    losses = [line["by_source"] for line in lines if "by_source" in line] or [{}]
    return [
        {
            "source": source,
            "tokens": count,
            "share": count / tokens.total(),
            "learned": learned.get(source),
            "learned_share": learned[source] / learned.total() if learned else None,
            "first": losses[0].get(source),
            "last": losses[-1].get(source),
        }
        for source, count in tokens.most_common()
    ]


def facts(header: Iterable[Sequence[str]] | None, fingerprint: dict[str, Any]) -> list[tuple[str, str]]:
    """The run's header as its user saw it; what the fingerprint knows of it where there is no header."""
    if header is not None:
        return [(str(name), str(value)) for name, value in header]
    recipe, choices = fingerprint.get("recipe", {}), fingerprint.get("choices", {})
    keys = ("model.path", "model.init", "tuning.method", "data.chat_template", "data.packing", "data.seq_len")
    named = {key: recipe[key] for key in keys if recipe.get(key) is not None} | choices
    return [(name, str(value)) for name, value in named.items()]


def read_attempts(run_dir: Path, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each attempt of logs/: its number, command, kept steps, and how it ended."""
    kept: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "step":
            kept[line["attempt"]].append(line["step"])
    attempts = []
    for folder in sorted((run_dir / "logs").glob("attempt_*")):
        attempt = int(folder.name.removeprefix("attempt_"))
        command, code = (_text(folder / name) for name in ("command.txt", "exit_code"))
        steps = kept[attempt]
        ends = [event for event in read_lines(folder / "events.jsonl") if event["event"] == "end"]
        attempts.append(
            {
                "number": attempt,
                "command": command,
                "steps": f"{steps[0]:,} to {steps[-1]:,}" if steps else "none",
                "rolled_back": len(read_lines(folder / "rolled_back.jsonl")),
                "ending": _ending(code) if code or not ends else ends[-1]["cause"],
            }
        )
    return attempts


def number(value: float | None) -> str:
    """Four significant digits, or whole with separators; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """3725.0 -> 1 h 02 min."""
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _ending(code: str) -> str:
    if not code:
        return "still running, or killed"
    return f"{ENDINGS.get(int(code), 'failed')} (exit code {code})" if code.isdigit() else f"exit code {code}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
