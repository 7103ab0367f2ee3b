"""What a preparation says beside its counts, and what it clears away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import template_cases
from preparing import byte_tokenizer, make_recipe, records, said, write_lines
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_dist.data import prepare as preparation
from sft_dist.data import selection
from sft_dist.data.builtin_templates import BUILTIN
from sft_dist.data.prepare import prepare
from sft_dist.data.templates import resolve_template


@pytest.mark.parametrize(
    ("tokenizer", "is_told"), [(byte_tokenizer(), True), (template_cases.byte_tokenizer(), False)], ids=["many", "one"]
)
def test_a_stop_text_of_several_tokens_is_told_with_the_remedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, is_told: bool
) -> None:
    lines: list[str] = []
    source = write_lines(tmp_path / "a.jsonl", records(3))
    prepare(make_recipe(tmp_path, source, chat_template="phi3"), tokenizer, notice=lines.append)
    found = [line for line in lines if "several tokens" in line]
    assert len(found) == is_told
    assert not found or found[0].endswith("or pass stop_strings=['<|end|>'] to generate")


def test_what_the_tokenizer_cannot_spell_is_counted_and_told(tmp_path: Path, shared: Path) -> None:
    """Baby Llama has no `_`: ChatML's marks and a name in the data become unknown tokens, and no model can stop."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/babyllama_tok105")
    told: dict[str, list[str]] = {}
    plain = write_lines(tmp_path / "plain.jsonl", [{"instruction": "say it", "output": "it"}])
    names = write_lines(tmp_path / "names.jsonl", [{"instruction": "a name", "output": "a_b_c"}])
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.role }} says {{ m.content }}{% endfor %}")
    for template in ("chatml", str(own)):
        told[template] = []
        recipe = make_recipe(tmp_path, plain, names, chat_template=template, eval_fraction=0)
        data = prepare(recipe, tokenizer, notice=told[template].append)
        for example, source in zip(data.train, data.report.sources, strict=True):
            assert source.unknown_tokens == (example.input_ids == tokenizer.unk_token_id).sum()
        assert sum("unknown one" in line for line in data.report.told()) == 2 - (template != "chatml")
    found = {name: [line for line in lines if "unknown one" in line] for name, lines in told.items()}
    assert len(found["chatml"]) == 2
    assert [line.partition(" tokens")[0] for line in found[str(own)]] == [f"warning: {names}: 2 of 39"]
    assert not any("ends answers with" in line for line in told[str(own)])
    (stop,) = (line for line in told["chatml"] if "ends answers with" in line)
    assert "cannot spell (it makes '<|im<unk>end|>' of it): no model can write it" in stop
    assert "stop_strings" not in stop


ASKS_OTHERWISE = (
    "alpaca chatml falcon-instruct gemma-it llama-3-instruct openchat-3.5 phi-3 saiga vicuna zephyr deepseekv3"
)


def test_a_template_that_asks_in_other_words_than_it_trains_is_told(tmp_path: Path, shared: Path) -> None:
    """Of the public ones those of a collection whose prompts end in a line of their own, and DeepSeek's."""
    own = template_cases.byte_tokenizer()
    files = {path.stem: path for path in (shared / "data/chat_templates").rglob("*.jinja")}
    told = {name: resolve_template(str(path), own).prompt_notices(own) for name, path in files.items()}
    assert len(files) == 33 and {name for name, lines in told.items() if lines} == set(ASKS_OTHERWISE.split())
    assert "asks a model with '<｜Assistant｜><think>\\n' and trains plain answers behind" in told["deepseekv3"][0]
    assert not any(resolve_template(name, own).prompt_notices(own) for name in BUILTIN)
    lines: list[str] = []
    source = write_lines(tmp_path / "a.jsonl", records(3))
    prepare(make_recipe(tmp_path, source, chat_template=str(files["vicuna"])), own, notice=lines.append)
    assert sum("asks a model with" in line for line in lines) == 1


def test_what_a_source_has_to_say_of_its_pin_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "pin_notices", lambda sources: [f"{len(sources)} looked at"])
    lines: list[str] = []
    prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3))), byte_tokenizer(), notice=lines.append)
    assert "1 looked at" in lines


def test_shards_that_killed_writers_left_half_written_go_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ".sft-cache" / preparation.SHARDS / "abc"
    folder.mkdir(parents=True)
    old, new, shard = (folder / name for name in (".tmp-old-1", ".tmp-new-1", "old"))
    for file in (old, new, shard):
        file.write_bytes(b"x")
    for file, hours in ((old, 25), (new, 23), (shard, 25)):
        then = time.time() - 3600 * hours
        os.utime(file, (then, then))
    prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(3))), byte_tokenizer(), notice=said)
    assert [file.exists() for file in (old, new, shard)] == [False, True, True]


@pytest.mark.parametrize(
    "asked",
    [{"near_duplicates": "together"}, {"near_duplicates": "drop"}, {"filters": {"drop_refusals": True}}],
    ids=["together", "drop", "filters"],
)
def test_looking_through_the_rows_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """One for each batch of rows, after all was read; the plain recipe's languages have theirs, too."""
    monkeypatch.setattr(selection, "_ROWS_AT_ONCE", 10)
    source, signs = write_lines(tmp_path / "a.jsonl", records(50)), dict[bool, list[str]]()
    for plain in (True, False):
        given = make_recipe(tmp_path, source, **({} if plain else asked))
        seen = signs[plain] = list[str]()
        prepare(
            given,
            byte_tokenizer(),
            notice=said,
            progress=lambda done, total, seen=seen: seen.append("bytes"),  # type: ignore[misc]
            alive=lambda seen=seen: seen.append("rows"),  # type: ignore[misc]
        )
        assert seen == sorted(seen)
    assert signs[False].count("rows") >= signs[True].count("rows") + 5


def test_a_preparation_dates_its_lock_for_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(50)))
    signs: list[str] = []

    @contextmanager
    def lock(*_: object) -> Iterator[Callable[[], None]]:
        yield lambda: signs.append("held")

    monkeypatch.setattr(preparation, "only_one", lock)
    prepare(given, byte_tokenizer(), notice=said, progress=lambda *_: signs.append("read"), alive=lambda: None)
    assert signs[:2] == ["held", "read"] and signs.count("held") > signs.count("read")
