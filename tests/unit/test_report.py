"""The report shows every part of a run folder, says what is missing, and lets no text of data or models become HTML."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli import main as cli
from sft_dist.errors import StorageError
from sft_dist.observe import report
from sft_dist.observe.answers import compare_samples, read_skills, scores
from sft_dist.observe.charts import running_mean
from sft_dist.observe.report import duration, number, percent, write_report

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</pre>"
NUM_STEPS = 60


def write_run(folder: Path, hostile: str = "") -> Path:
    """A finished run of two attempts: every file that the report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "held_out.jsonl"
    skills = ["sort", "count", "sort", f"copy{hostile}"]
    data.write_text("".join(json.dumps({"messages": [], "skill": skill}) + "\n" for skill in skills))
    ids = [f"{data}:{line}" for line in range(1, 5)]
    _lines(folder / "metrics.jsonl", _metrics())
    _lines(folder / "samples.jsonl", [_answer(record, step, hostile) for step in (0, 30, 60) for record in ids[:2]])
    checked = [
        {"phase": phase} | _answer(i, 60 * (phase == "after"), hostile) for phase in ("before", "after") for i in ids
    ]
    _lines(folder / "exact_match.jsonl", checked)
    _json(
        folder / "summary.json", {"finished": True, "steps": 60, "exact_match_before": 0.0, "exact_match_after": 0.75}
    )
    _json(folder / "fingerprint.json", _fingerprint())
    _json(folder / "header.json", [["run", f"demo{hostile}"], ["certificate", "boundaries 0.0e+00 <= 1e-05"]])
    _json(folder / "prepare_report.json", _prepare_report(hostile))
    (folder / "config.yaml").write_text(f"run:\n  name: demo # {hostile}\n")
    for attempt, code in ((1, "75"), (2, "0")):
        logs = folder / "logs" / f"attempt_{attempt:04d}"
        logs.mkdir(parents=True)
        (logs / "command.txt").write_text(f"sft-dist train demo.yaml {hostile}\n")
        (logs / "exit_code").write_text(f"{code}\n")
    return folder


def _metrics() -> list[dict[str, Any]]:
    steps = [
        {
            "kind": "step",
            "step": n,
            "attempt": 1 if n <= 35 else 2,
            "loss": 4 * math.exp(-n / 20) + 0.2 * math.sin(n),
            "grad_norm": 1 + math.cos(n) / 3,
            "lr": 1e-3 * min(1, n / 6),
            "num_tokens": 2000,
            "num_loss_tokens": 400,
            "batch_digest": "0" * 64,
            "step_seconds": 0.5,
            "tokens_per_second": 4000.0 + 100 * math.sin(n),
            "mfu": None,
            "peak_memory_gib": 0.75,
        }
        for n in range(1, NUM_STEPS + 1)
    ]
    evals = [
        {"kind": "eval", "step": n, "eval_loss": 4 * math.exp(-n / 25) + 0.3, "num_loss_tokens": 900}
        for n in (0, 30, 60)
    ]
    return [*evals[:1], *steps, *evals[1:]]


def _answer(record: str, step: int, hostile: str) -> dict[str, Any]:
    right = step == 60 and not record.endswith(":2")
    return {
        "step": step,
        "id": record,
        "prompt": f"### Instruction:\nSort these words: plum fig kiwi{hostile}\n\n### Response:\n",
        "reference": f"fig kiwi plum{hostile}",
        "answer": f"fig kiwi plum{hostile}" if right else f"gate gate{hostile}",
        "match": right,
    }


def _fingerprint() -> dict[str, Any]:
    return {
        "recipe": {"model.path": "org/base", "tuning.method": "full", "data.packing": "best_fit"},
        "inputs": {"data.train": "ab" * 32, "plan": "cd" * 32},
        "choices": {"lr": 0.002, "strategy": "ddp"},
        "versions": {"torch": "2.13.0"},
    }


def _prepare_report(hostile: str) -> dict[str, Any]:
    source = {
        "path": f"train.jsonl{hostile}", "formats": ["messages"], "guessed": True, "records": 1300, "accepted": 1234,
        "rejected": 1, "too_long": 65, "no_target": 0, "truncated": 0, "duplicates": 3, "supervised_share": 0.25,
    }  # fmt: skip
    split = {
        "examples": 1234, "tokens": 40_000, "loss_tokens": 10_000, "supervised_share": 0.25,
        "lengths": {"min": 5, "mean": 32.4, "p50": 31.0, "p90": 50.0, "p99": 60.0, "max": 63},
        "histogram": {"edges": [0, 20, 40, 64], "counts": [200, 800, 234]},
        "longest": [{"id": f"train.jsonl:77{hostile}", "tokens": 63}], "languages": {f"en{hostile}": 480, "de": 20},
    }  # fmt: skip
    return {
        "template": "alpaca",
        "seq_len": 64,
        "sources": [source],
        "splits": {"train": split, "eval": split},
        "rejects": [{"file": "train.jsonl", "line": 7, "byte": 99, "reason": f"no answer{hostile}"}],
        "dropped": [
            {
                "id": f"train.jsonl:9{hostile}",
                "file": "train.jsonl",
                "line": 9,
                "byte": 120,
                "reason": "80 tokens, more than data.seq_len=64",
            }
        ],
        "notices": [f"warning: 2 of 50 eval examples are in train too{hostile}"],
    }


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and text."""

    VOID = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


def test_a_finished_run_shows_every_part(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run_dir / "report.html"
    for part in (
        "finished after 60 steps", "75.0 %", "from 0.0 %", "validation loss", "120,000",  # figures
        "sort", "count", "copy", "fig kiwi plum", "gate gate", "step 0", "step 60", "✓ exact",  # answers
        "1,300", "1,234", "65", "25.0 %", "no answer", "more than data.seq_len", "are in train too",
        "train.jsonl:77 (63)", "Languages of 500 rows: en 480, de 20",  # data
        "boundaries 0.0e+00 <= 1e-05", "cd" * 32, "2.13.0", "name: demo",  # run
        "1 to 35", "36 to 60", "stopped on request with a checkpoint (exit code 75)", "finished (exit code 0)",
    ):  # fmt: skip
        assert part in page.text, part
    assert "Not in the run folder" not in page.text


def test_the_page_needs_nothing_from_outside_and_the_pictures_also_lie_beside_it(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    inside = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in inside)
    assert "http" not in re.sub(r'src="[^"]*"', "", html)
    names = {"loss", "lr", "grad_norm", "throughput", "lengths"}
    files = {path.stem: path.read_bytes() for path in (run_dir / "report").glob("*.png")}
    assert files.keys() == names
    assert {base64.b64decode(str(value).partition(",")[2]) for value in inside} == set(files.values())
    for png in files.values():
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 400 and height > 200


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = Page(write_report(write_run(tmp_path / "a" / "demo")).read_text(encoding="utf-8"))
    attacked = Page(write_report(write_run(tmp_path / "b" / "demo", HOSTILE)).read_text(encoding="utf-8"))
    assert attacked.tags == plain.tags and "script" not in attacked.tags
    assert attacked.text.count(HOSTILE) >= 10  # shown as it is: not run as a template either


@pytest.mark.parametrize("name", [*report.READ_FILES, "header.json", "exact_match.jsonl", "logs"])
def test_any_file_may_be_missing(run_dir: Path, name: str) -> None:
    path = run_dir / name
    path.rename(run_dir.parent / "away")
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert (f"Not in the run folder: {name}" in page.text) is (name in report.READ_FILES)


def test_a_run_killed_before_its_first_step_is_described(tmp_path: Path) -> None:
    (tmp_path / "logs" / "attempt_0001").mkdir(parents=True)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "not finished, before the first step: still running, or killed" in page.text
    assert "No step is recorded" in page.text and "No sample answers are recorded" in page.text


def test_a_stopped_run_says_how_it_ended(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "logs" / "attempt_0002" / "exit_code").write_text("70\n")
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "not finished, after step 60: loss or gradient norm not finite (exit code 70)" in page.text


def test_numbers_that_are_not_finite_are_shown_and_drawn_as_gaps(run_dir: Path) -> None:
    lines = _metrics()
    lines[40] |= {"loss": math.nan, "grad_norm": math.inf}
    lines[-1]["eval_loss"] = math.nan
    _lines(run_dir / "metrics.jsonl", lines)
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "validation loss" in page.text and "nan" in page.text
    assert (run_dir / "report" / "loss.png").stat().st_size > 5000


def test_an_interrupted_last_line_is_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert "60" in Page(write_report(run_dir).read_text(encoding="utf-8")).text


def test_writing_again_replaces_the_page_and_draws_the_same_pictures(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert not list(run_dir.glob("*.tmp"))


def test_a_place_that_cannot_be_written_is_a_storage_error(run_dir: Path) -> None:
    (run_dir / "report").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"report\.html: cannot be written"):
        write_report(run_dir)


def test_scores_are_shares_per_skill_with_all_first(tmp_path: Path) -> None:
    data = tmp_path / "t.jsonl"
    data.write_text('{"skill": "a"}\n{"skill": "b"}\nnot json\n[1]\n{"skill": 3}\n')
    records = [{"phase": phase, "id": f"{data}:{n}", "match": phase == "after" and n != 2}
               for phase in ("before", "after") for n in range(1, 6)]  # fmt: skip
    found = {score.skill: (score.before, score.after, score.num_after) for score in scores(records)}
    assert found == {"all": (0.0, 0.8, 5), "a": (0.0, 1.0, 1), "b": (0.0, 0.0, 1)}
    only_before = scores([record for record in records if record["phase"] == "before"])
    assert only_before[0].after is None and scores([]) == []


def test_skills_come_only_from_jsonl_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"skill": "a"}\n')
    assert read_skills([f"{tmp_path}/x.json:1", f"{tmp_path}/gone.jsonl:1", "no id", f"{tmp_path}/x.jsonl:1+20"]) == {}


def test_samples_stand_beside_the_first_answer_to_the_same_prompt() -> None:
    def line(step: int, record: str, answer: str) -> dict[str, Any]:
        return {"step": step, "id": record, "prompt": "p", "reference": "r", "answer": answer, "match": answer == "r"}

    found = compare_samples([line(0, "a", "x"), line(5, "a", "y"), line(9, "a", "r"), line(9, "b", "z")])
    assert [(s.id, s.before, s.after, s.matched_after) for s in found] == [
        ("a", "x", "r", True),
        ("b", None, "z", False),
    ]
    assert compare_samples([line(0, "a", "x")])[0].before is None  # one evaluation so far: nothing to compare with


def test_a_mean_passes_over_what_is_not_finite() -> None:
    means = running_mean([1.0, math.nan, 3.0, math.inf, math.nan], 2)
    assert means[:4] == [1.0, 1.0, 3.0, 3.0] and math.isnan(means[4])


def test_numbers_for_people() -> None:
    assert [number(x) for x in (0.123456, 12345.6, math.nan, None)] == ["0.1235", "12,346", "nan", "–"]
    assert (percent(None), percent(0.975)) == ("–", "97.5 %")
    assert [duration(x) for x in (59.6, 3725.0, math.inf)] == ["1 min 00 s", "1 h 02 min", "inf"]


def test_the_verb_prints_the_path_and_refuses_what_is_no_run_folder(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "so it is no run folder" in capsys.readouterr().err


def test_the_mix_tells_tokens_and_learned_tokens_of_each_source() -> None:
    before = {"kind": "step", "tokens_by_source": {"a": 100}}  # written before learned tokens were counted
    steps = [
        {"kind": "step", "tokens_by_source": {"a": 300, "b": 200}, "loss_tokens_by_source": {"a": 30, "b": 90}},
        {"kind": "step", "tokens_by_source": {"a": 200}, "loss_tokens_by_source": {"a": 60}},
    ]
    found = [[part[key] for key in ("source", "tokens", "learned", "learned_share")] for part in report.mix(steps)]
    assert found == [["a", 500, 90, 0.5], ["b", 200, 90, 0.5]]
    assert [(part["learned"], part["learned_share"]) for part in report.mix([before])] == [(None, None)]
    measured = [{"kind": "eval", "by_source": {"a": loss}} for loss in (3.0, 2.0)]
    losses = [(report.number(part["first"]), report.number(part["last"])) for part in report.mix([*steps, *measured])]
    assert losses == [("3", "2"), ("–", "–")], "nothing of b was held out"


def test_a_mixed_run_shows_what_was_learned_of_each_source(run_dir: Path) -> None:
    metrics = [
        line | {"tokens_by_source": {"a": 1500, "b": 500}, "loss_tokens_by_source": {"a": 100, "b": 300}}
        for line in _metrics()
        if line["kind"] == "step"
    ]
    _lines(run_dir / "metrics.jsonl", metrics)
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    num = len(metrics)
    for figure in (f"{1500 * num:,}", f"{100 * num:,}", f"{300 * num:,}", "learned"):
        assert figure in page.text
