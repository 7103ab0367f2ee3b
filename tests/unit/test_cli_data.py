"""`sft-dist data ...` as a user types it: readable for people, one JSON value for programs."""

import json
import re
import shutil
from contextlib import ExitStack
from io import StringIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from sft_dist.cli import progress
from sft_dist.cli.data_stats import show_report
from sft_dist.cli.main import main
from sft_dist.data import cache
from sft_dist.data.report import PrepareReport, SplitReport
from sft_dist.data.stream_store import StreamStore
from sft_dist.errors import EXIT_USAGE
from sft_dist.observe.progress_lines import ProgressLines
from tests.preparing import byte_tokenizer, records, write_lines

ARCHITECTURE = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "vocab_size: 300}"
)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe file in the working directory: 40 Alpaca records, a byte tokenizer, a small Llama."""
    monkeypatch.chdir(tmp_path)
    byte_tokenizer().save_pretrained("tokenizer")
    write_lines(tmp_path / "a.jsonl", records(40))
    (tmp_path / "r.yaml").write_text(
        f"model: {{init: random, tokenizer: tokenizer, config: {ARCHITECTURE}}}\n"
        "data: {sources: [{path: a.jsonl}], chat_template: chatml, seq_len: 256}\n"
        "batch: {tokens_per_micro_batch: 512, tokens_per_step: 1024}\n"
    )
    return "r.yaml"


def run(capsys, *arguments: str) -> str:
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def test_prepare_tells_the_guess_and_shows_three_examples(recipe, capsys):
    shown = run(capsys, "prepare", recipe)
    assert "a.jsonl: alpaca (recognised), 40 of 40 records used" in shown
    assert "train: 39 examples" in shown and "% supervised" in shown
    assert shown.count("learned  ") == 3
    assert "<|im_end|>" in shown


def test_prepare_as_json_is_the_report_and_the_folder(recipe, capsys):
    value = json.loads(run(capsys, "prepare", recipe, "--json"))
    assert value["splits"]["train"]["examples"] == 39
    assert ".sft-cache" in value["folder"]


def test_ids_beyond_the_embedding_are_refused_before_anything_is_prepared(recipe, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace("vocab_size: 300", "vocab_size: 50"))
    assert main(["data", "prepare", recipe]) == 2
    size = len(byte_tokenizer())
    told = f"model: the tokenizer has {size} ids but the embedding only 50 rows: use the model's own tokenizer"
    assert told in capsys.readouterr().err
    assert not (tmp_path / ".sft-cache").exists()


def test_ids_beyond_the_embedding_are_found_in_config_json_alone(recipe, capsys, tmp_path):
    """A folder without weights, as it is on a login node."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 50}')
    (tmp_path / "r.yaml").write_text(
        "model: {path: model, tokenizer: tokenizer}\n"
        "data: {sources: [{path: a.jsonl}], chat_template: chatml, seq_len: 256}\n"
    )
    assert main(["data", "prepare", recipe]) == 2
    assert "the embedding only 50 rows: use the model's own tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "dry_run_code", "told"),
    [
        ("optim.lrr=1", 2, "unknown key: did you mean 'optim.lr'?"),
        ("batch.tokens_per_step=1000", 2, "must be a multiple of batch.tokens_per_micro_batch"),
        ("data.sources=[{path: missing.jsonl}]", 2, "missing.jsonl: no such file"),
        ("data.chat_template=none.jinja", 2, "none.jinja: "),
        ("data.sources=[{path: broken.jsonl}]", 0, "broken.jsonl:1 (byte 0): invalid JSON"),
        ("data.sources=[{path: odd.jsonl}]", 0, "odd.jsonl:1 (byte 0): fields (foo) fit no known format"),
        ("data.sources=[{path: empty.jsonl}]", 0, "empty.jsonl:1 (byte 0): field 'output' is empty"),
        ("model.config.vocab_size=50", 0, "use the model's own tokenizer"),
    ],
)
def test_what_the_two_dry_runs_find(recipe, capsys, tmp_path, override, dry_run_code, told):
    """`train --dry-run` reads the recipe and looks for its files; `data prepare` reads them, and the tokenizer."""
    (tmp_path / "broken.jsonl").write_text("nope\n")
    (tmp_path / "odd.jsonl").write_text('{"foo": 1}\n')
    (tmp_path / "empty.jsonl").write_text('{"instruction": "x", "output": ""}\n')
    assert main(["train", recipe, "--dry-run", override]) == dry_run_code
    assert (told in capsys.readouterr().err) == (dry_run_code != 0)
    assert main(["data", "prepare", recipe, override]) != 0
    assert told.split(" no such")[0].strip() in capsys.readouterr().err


def test_inspect_shows_the_asked_rows(recipe, capsys):
    views = json.loads(run(capsys, "inspect", recipe, "--row", "3", "--row", "0", "--json"))
    assert [view["row"] for view in views] == [3, 0]
    for view in views:
        learned = "".join(text for text, weight in view["pieces"] if weight > 0)
        assert [learned] == view["learned"]
        assert learned.startswith("answer number ") and learned.endswith("<|im_end|>")


def test_inspect_writes_a_page(recipe, capsys, tmp_path):
    assert run(capsys, "inspect", recipe, "-n", "2", "--html", "page.html").strip() == "page.html"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<section>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "99"], "--row 99: the train split has rows 0 to 38"),
        (["--split", "test"], "raise data.test_fraction"),
        (["--grep", "nowhere"], "--grep 'nowhere': no row of the train split fits"),
        (["--source", "b.jsonl", "--grep", "answer"], "--source 'b.jsonl' --grep 'answer': no row"),
        (["--step", "99"], "step 99: this run has steps 1 to "),
        (["--pack", "1:0"], "--pack 1:0: must be STEP:MICRO:PACK"),
        (["--pack", "1:7:0"], "--pack 1:7:0: step 1 has packs 1:0:0 to 1:1:1"),
        (["--pack", "1:0:0", "--step", "1"], "give one of them"),
        (["--step", "1", "--split", "eval"], "only train is planned in steps"),
        (["--html", "no/where.html"], "no/where.html: cannot be written"),
    ],
    ids=["row", "split", "grep", "source", "step", "pack form", "pack", "both", "eval step", "html"],
)
def test_inspect_refuses_what_is_not_there(recipe, capsys, arguments, message):
    assert main(["data", "inspect", recipe, *arguments]) == (74 if "--html" in arguments else 2)
    assert message in capsys.readouterr().err


def test_stats_lists_rejects_with_their_place(recipe, capsys, tmp_path):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"instruction": "no answer"}\n')
    shown = run(capsys, "stats", recipe, "data.on_bad_record=skip", "data.max_bad_fraction=0.1")
    assert "a.jsonl:41 (byte" in shown
    assert "1 bad" in shown
    assert "lengths of train, in tokens" in shown and "█" in shown
    assert re.search(r"longest of train\n +\d+ tokens: \S*a\.jsonl:\d+", shown)


def test_inspect_by_text_and_by_length(recipe, capsys):
    (found,) = json.loads(run(capsys, "inspect", recipe, "--grep", "NUMBER 17<", "--json"))
    assert found["learned"] == ["answer number 17<|im_end|>"]
    longest = json.loads(run(capsys, "inspect", recipe, "--longest", "-n", "40", "--json"))
    lengths = [view["num_tokens"] for view in longest]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 39
    assert len(json.loads(run(capsys, "inspect", recipe, "--source", "a.jsonl", "-n", "2", "--json"))) == 2


def test_inspect_shows_the_packs_of_a_step(recipe, capsys):
    (packs, examples) = json.loads(run(capsys, "inspect", recipe, "--step", "1", "--json")).values()
    assert [pack["pack"] for pack in packs] == ["1:0:0", "1:0:1", "1:1:0", "1:1:1"] and examples == []
    assert all(pack["cu_seqlens"][-1] == sum(pack["lengths"]) <= 256 for pack in packs)
    shown = run(capsys, "inspect", recipe, "--step", "1")
    assert shown.count("├") == 4 and f"{packs[0]['rows'][0]}@0" in shown
    (pack,), documents = json.loads(run(capsys, "inspect", recipe, "--pack", "1:1:0", "--json")).values()
    assert pack == packs[2]
    assert [view["row"] for view in documents] == pack["rows"]


@pytest.mark.parametrize("arguments", [["--row", "1"], ["--step", "1"], ["--pack", "1:0:0"]])
def test_inspect_fits_80_columns_and_needs_no_colour(recipe, capsys, monkeypatch, arguments):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(capsys, "inspect", recipe, *arguments)
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b[" not in shown
    assert ("▶1 ⟦answer" in shown) == (arguments[0] != "--step")


def test_stats_survey_what_was_stored(recipe, capsys):
    survey = json.loads(run(capsys, "stats", recipe, "--json"))["survey"]
    assert survey["looked_at"] == {"train": 39, "eval": 1}
    assert survey["tasks"] == [["question", "", 40]]
    shown = run(capsys, "stats", recipe)
    for text in ("tasks: 1 different", "worth a look (nothing was dropped)", "near-duplicates:", "eval against train"):
        assert text in shown


def test_the_numbers_of_a_large_store_are_whole_in_80_columns():
    lengths = dict.fromkeys(["min", "mean", "p50", "p90", "p99", "max"], 131_072.0)
    split = SplitReport(123_456_789, 98_765_432_100, 9, 0.5, lengths, {"edges": [0, 200_000], "counts": [9]})
    console = Console(file=StringIO(), width=80)
    show_report(console, PrepareReport("chatml", 131_072, splits=dict.fromkeys(["train", "eval", "test"], split)))
    shown = console.file.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert re.search(r"tokens( +98,765,432,100){3}", shown) and re.search(r"length, p99( +131,072){3}", shown)


def test_stats_write_a_page(recipe, capsys, tmp_path):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"instruction": "Write <script>alert(1)</script>", "output": "<b>"}\n')
    assert run(capsys, "stats", recipe, "--html", "stats.html").strip() == "stats.html"
    page = (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert re.search(r"train, longest: \S*a\.jsonl:\d+ \(\d+\), ", page)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page.count("<details>") == page.count("</details>") and page.rstrip().endswith("</html>")


def test_plan_reports_steps_efficiency_and_balance(recipe, capsys):
    value = json.loads(run(capsys, "plan", recipe, "--world-size", "3", "--json"))
    assert value["steps"] == 3 * value["steps_per_epoch"]
    assert (value["packs_per_micro_batch"], value["micro_batches_per_step"]) == (2, 2)
    assert 0.5 < value["efficiency"] <= 1
    slots = value["packs_per_epoch"] * 256
    assert value["padding_per_epoch"] == slots - value["tokens_per_epoch"] > 0
    assert value["efficiency"] == pytest.approx(value["tokens_per_epoch"] / slots)
    assert set(value["balance"]) == {"1", "2", "3", "4", "8", "64", "1024"}
    assert len(value["digest"]) == 64
    shown = run(capsys, "plan", recipe)
    assert "per epoch" in shown and value["digest"][:16] in shown
    assert f"{value['padding_per_epoch']:,} are padding" in " ".join(shown.split())


STREAMED = ["data.sources.0.streaming=true", "data.eval_fraction=0", "optim.max_steps=2", "data.workers=0"]


@pytest.mark.parametrize("settings", [[], STREAMED], ids=["whole", "streamed"])
def test_nothing_to_train_exits_65_with_the_counts(recipe, capsys, settings):
    assert main(["data", "prepare", recipe, "data.seq_len=8", "batch.tokens_per_micro_batch=8", *settings]) == 65
    assert "0 trainable examples of 40 records (40 longer than data.seq_len=8" in capsys.readouterr().err


VERBS = ["prepare", "inspect", "stats", "plan"]


@pytest.mark.parametrize("verb", VERBS)
def test_notices_go_to_stderr_and_what_the_report_holds_does_not_come_twice(recipe, capsys, verb):
    """phi3 stops at a text that is several of these tokens; near-duplicates are told by the report."""
    assert main(["data", verb, recipe, "data.chat_template=phi3"]) == 0
    out, err = capsys.readouterr()
    assert err.count("several tokens") == 1 and "several tokens" not in out
    assert (out + err).count("near-duplicates of held-out") == 1
    assert ("near-duplicates of held-out" in out) == (verb in ("prepare", "stats"))
    assert main(["data", verb, recipe, "data.chat_template=phi3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and err.count("several tokens") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_who_waits_for_another_process_says_so(recipe, capsys, monkeypatch, verb):
    entry = Path(json.loads(run(capsys, "prepare", recipe, "--json"))["folder"])
    shutil.rmtree(entry)
    with ExitStack() as holder:
        holder.enter_context(cache.only_one(entry.with_suffix(".lock"), lambda: None))
        clock = SimpleNamespace(sleep=lambda seconds: holder.close(), monotonic=lambda: 0.0)
        monkeypatch.setattr(cache, "time", clock)
        assert main(["data", verb, recipe]) == 0
    out, err = capsys.readouterr()
    assert err.count(f"another process is preparing this data; waiting for it ({entry})") == 1
    assert out and "another process" not in out


@pytest.fixture
def slow(monkeypatch):
    """Eleven seconds pass between any two looks at the clock."""
    seconds = count(step=11)
    clocked = lambda say, **more: ProgressLines(say, lambda: float(next(seconds)), **more)  # noqa: E731
    monkeypatch.setattr(progress, "ProgressLines", clocked)


@pytest.mark.parametrize("verb", VERBS)
def test_where_there_is_no_terminal_lines_tell_how_far_it_is(recipe, capsys, slow, verb):
    assert main(["data", verb, recipe, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "preparing: 0.00 of 0.00 MB (9" in err
    assert "preparing: all is read; choosing the rows of each split" in err
    assert ("looking: 40 of 40 rows (100 %), " in err) == (verb == "stats")
    assert main(["data", verb, recipe, "--json"]) == 0
    again, err = capsys.readouterr()
    assert again == out and "preparing: " not in err


def test_the_first_window_of_a_stream_is_told_as_it_is_read(recipe, capsys, slow, monkeypatch):
    chunks = count()
    monkeypatch.setattr(StreamStore, "_progress", lambda self: b"1 %d %d" % ((n := next(chunks)), 1000 * n))
    assert main(["data", "prepare", recipe, "--json", *STREAMED]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sources"][0]["records"] == 40
    assert "reading the stream: 1,000 records, " in err


def test_ids_without_a_row_are_refused_before_anything_is_tokenised(recipe, capsys, tmp_path):
    """From the config alone, in the words of the worker that would have met them."""
    few = ARCHITECTURE.replace("vocab_size: 300", "vocab_size: 50")
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace(ARCHITECTURE, few))
    assert main(["data", "prepare", recipe]) == EXIT_USAGE
    size = len(byte_tokenizer())
    line = f"the tokenizer has {size} ids but the embedding only 50 rows: use the model's own tokenizer"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_added_tokens_will_get_rows(recipe, capsys, tmp_path):
    tokenizer = byte_tokenizer()
    exact = ARCHITECTURE.replace("vocab_size: 300", f"vocab_size: {len(tokenizer)}")
    tokenizer.add_tokens(["<call>", "<result>"], special_tokens=True)
    tokenizer.save_pretrained("tokenizer")
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace(ARCHITECTURE, exact))
    assert "train: 39 examples" in run(capsys, "prepare", recipe)
