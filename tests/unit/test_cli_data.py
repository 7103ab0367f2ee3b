"""`sft-dist data ...` as a user types it: readable for people, one JSON value for programs."""

import json

import pytest

from sft_dist.cli.main import main
from tests.unit.test_prepare import byte_tokenizer, records, write_lines

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
    ],
    ids=["row", "split"],
)
def test_inspect_refuses_what_is_not_there(recipe, capsys, arguments, message):
    assert main(["data", "inspect", recipe, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_stats_lists_rejects_with_their_place(recipe, capsys, tmp_path):
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"instruction": "no answer"}\n')
    shown = run(capsys, "stats", recipe, "data.on_bad_record=skip", "data.max_bad_fraction=0.1")
    assert "a.jsonl:41 (byte" in shown
    assert "1 bad" in shown
    assert "lengths of train, in tokens" in shown and "█" in shown


def test_plan_reports_steps_efficiency_and_balance(recipe, capsys):
    value = json.loads(run(capsys, "plan", recipe, "--world-size", "3", "--json"))
    assert value["steps"] == 3 * value["steps_per_epoch"]
    assert (value["packs_per_micro_batch"], value["micro_batches_per_step"]) == (2, 2)
    assert 0.5 < value["efficiency"] <= 1
    assert set(value["balance"]) == {"1", "2", "3", "4", "8"}
    assert len(value["digest"]) == 64
    shown = run(capsys, "plan", recipe)
    assert "per epoch" in shown and value["digest"][:16] in shown


def test_nothing_to_train_exits_65_with_the_counts(recipe, capsys):
    assert main(["data", "stats", recipe, "data.seq_len=8", "batch.tokens_per_step=auto"]) == 65
    assert "0 trainable examples of 40 records (40 longer than data.seq_len=8" in capsys.readouterr().err
