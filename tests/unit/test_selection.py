"""What a recipe asks to leave out is left out, counted and listed, before anything is held out."""

from __future__ import annotations

import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from preparing import byte_tokenizer, decoded, make_recipe, records, said, write_lines

from sft_dist.data.prepare import prepare
from sft_dist.data.selection import Origin, select
from sft_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def row(question: str, answer: str, **more) -> dict:
    return {"instruction": question, "output": answer} | more


MIXED = [
    *[row(f"Name animal number {n} of the list that I sent you.", f"It is animal {n * 7919}.") for n in range(20)],
    row("Say no.", "No"),
    row("Repeat.", "again and again and " * 20),
    row("Help me.", "I'm sorry, but I can't help with that request."),
]


@pytest.mark.parametrize(
    ("filters", "kind", "left"),
    [
        ({"min_answer_tokens": 8}, "min_answer_tokens", ["Say no."]),
        ({"max_repetition": 0.5}, "max_repetition", ["Repeat."]),
        ({"drop_refusals": True}, "drop_refusals", ["Help me."]),
    ],
)
def test_a_rule_leaves_out_what_breaks_it_and_says_so(tmp_path, tokenizer, filters, kind, left):
    source = write_lines(tmp_path / "a.jsonl", MIXED)
    data = prepare(
        make_recipe(tmp_path, source, filters=filters, eval_fraction=0.1, seq_len=1024), tokenizer, notice=said
    )
    texts = [text for store in (data.train, data.eval) for text in decoded(store, tokenizer)]
    assert not [text for text in texts for question in left if question in text]
    assert len(texts) == len(MIXED) - len(left) and len(data.eval) == 2
    counts = data.report.sources[0]
    assert counts.filtered == {kind: len(left)}
    assert f"{len(left)} left out by {kind}" in counts.describe()
    listed = [json.loads(line) for line in (data.folder / "dropped.jsonl").read_text().splitlines()]
    assert [(one["id"], one["kind"]) for one in listed] == [(f"{source}:{20 + 1 + _place(left[0])}", kind)]


def _place(question: str) -> int:
    return [r["instruction"] for r in MIXED[20:]].index(question)


def test_nothing_is_left_out_unasked(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", MIXED)
    data = prepare(make_recipe(tmp_path, source, eval_fraction=0.0, seq_len=1024), tokenizer, notice=said)
    assert len(data.train) == len(MIXED)


def test_a_score_keeps_the_best_and_refuses_none(tmp_path, tokenizer):
    rows = [r | {"score": n / 10} for n, r in enumerate(records(10))] + [row("unscored", "x")]
    source = write_lines(tmp_path / "a.jsonl", rows)
    asked = {"filters": {"score": {"column": "score", "min": 0.5}}, "eval_fraction": 0.0}
    data = prepare(make_recipe(tmp_path, source, **asked), tokenizer, notice=said)
    assert len(data.train) == 5 and data.report.sources[0].score == 6
    assert "score=None is no number" in data.report.dropped[-1]["reason"]
    assert "5 of 11 records used" in data.report.sources[0].describe()


NEAR = [
    row(f"Tell me about the {animal} of the northern woods, please.", f"The {animal} lives in the woods, number {n}.")
    for animal in ("fox", "owl", "elk", "bear", "wolf", "hare", "lynx", "mole")
    for n in (1, 2, 3)
]


def test_near_duplicates_are_dropped_but_for_the_first(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", NEAR)
    data = prepare(make_recipe(tmp_path, source, near_duplicates="drop", eval_fraction=0.0), tokenizer, notice=said)
    assert sorted(one.id for one in data.train) == sorted(f"{source}:{n}" for n in range(1, 25, 3))
    assert data.report.sources[0].filtered == {"drop_near_duplicates": 16}


def test_near_duplicates_of_an_evaluation_set_are_dropped_from_training(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", NEAR[:6])
    held = write_lines(tmp_path / "e.jsonl", NEAR[1:2])
    asked = {"near_duplicates": "drop", "eval_fraction": 0.0, "eval_sources": [{"path": str(held)}]}
    data = prepare(make_recipe(tmp_path, source, **asked), tokenizer, notice=said)
    assert [one.id for one in data.train] == [f"{source}:4"] and len(data.eval) == 1


def test_together_no_near_duplicate_crosses_a_split(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", NEAR)

    def animals(split):
        return {text.split("the ")[1].split(" ")[0] for text in decoded(split, tokenizer)}

    crossed = 0
    for seed in range(3):
        for kept in ("ignore", "together"):
            recipe = make_recipe(tmp_path, source, near_duplicates=kept, eval_fraction=0.3)
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
            data = prepare(recipe, tokenizer, notice=said)
            shared = animals(data.train) & animals(data.eval)
            assert not (shared and kept == "together")
            crossed += bool(shared)
            assert len(data.train) + len(data.eval) == len(NEAR)
    assert crossed == 3  # without it they do cross


def test_rows_left_out_do_not_count_for_temperature(tmp_path, tokenizer):
    large = write_lines(tmp_path / "large.jsonl", [*records(30), *[row(f"n{n}", "No") for n in range(60)]])
    small = write_lines(tmp_path / "small.jsonl", records(30, answer="another answer {}"))
    asked = {"filters": {"min_answer_tokens": 8}, "mixture_temperature": 2.0, "eval_fraction": 0.0}
    data = prepare(make_recipe(tmp_path, large, small, **asked), tokenizer, notice=said)
    assert [source.copies for source in data.report.sources] == pytest.approx([1.0, 1.0])
    assert len(data.train) == 60 and not np.isin("No", decoded(data.train, tokenizer))


def test_an_unknown_filter_is_refused(tmp_path):
    with pytest.raises((ConfigError, ValueError), match="filters"):
        make_recipe(tmp_path, tmp_path / "a.jsonl", filters={"min_answr_tokens": 3})


def test_repetition_is_exact_and_no_temperature_changes_it(tmp_path, tokenizer):
    large = write_lines(tmp_path / "large.jsonl", records(90))
    small = write_lines(tmp_path / "small.jsonl", records(10, answer="small {}"))
    thrice = {"path": str(write_lines(tmp_path / "thrice.jsonl", records(5, answer="thrice {}"))), "repeat": 3}
    asked = {"mixture_temperature": 2.0, "eval_fraction": 0.0}
    texts = decoded(
        prepare(make_recipe(tmp_path, large, small, thrice, **asked), tokenizer, notice=said).train, tokenizer
    )
    assert [sum(word in text for text in texts) for word in ("small", "thrice")] == [25, 15] and len(texts) == 115


def test_weight_and_repeat_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="give one of them"):
        make_recipe(tmp_path, {"path": "a.jsonl", "repeat": 2, "weight": 0.5})


@pytest.mark.parametrize(("weight", "trained"), [(0.5, 60), (3.0, 360), (0.05, 6)])
def test_weights_are_for_what_is_trained_and_held_out_rows_come_once(tmp_path, tokenizer, weight, trained):
    source = {"path": str(write_lines(tmp_path / "a.jsonl", records(200))), "weight": weight}
    asked = {"eval_fraction": 0.2, "test_fraction": 0.2}
    data = prepare(make_recipe(tmp_path, source, **asked), tokenizer, notice=said)
    assert (len(data.train), len(data.eval), len(data.test)) == (trained, 40, 40)


def test_a_weight_that_leaves_nothing_is_named(tmp_path, tokenizer):
    source = {"path": str(write_lines(tmp_path / "a.jsonl", records(100))), "weight": 0.001}
    with pytest.raises(DataError, match="0 of 100 usable examples are trained per epoch: raise weight"):
        prepare(make_recipe(tmp_path, source), tokenizer, notice=said)


def test_evaluation_sources_have_no_weight(tmp_path):
    with pytest.raises(ValueError, match=r"data\.eval_sources\.0 has a weight or repeat"):
        make_recipe(tmp_path, "a.jsonl", eval_sources=[{"path": "e.jsonl", "weight": 0.5}])


def test_near_duplicates_of_given_evaluation_rows_are_warned_about(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", NEAR)
    held = write_lines(tmp_path / "e.jsonl", [row(NEAR[0]["instruction"], "The fox lives in the woods, number 9.")])
    asked = {"near_duplicates": "together", "eval_fraction": 0.0, "eval_sources": [{"path": str(held)}]}
    lines: list[str] = []
    prepare(make_recipe(tmp_path, source, **asked), tokenizer, notice=lines.append)
    assert any(line.startswith("warning: 1 of 1 eval examples are in train too") for line in lines)


def test_drawing_splits_takes_what_the_documentation_says(tmp_path):
    """About 76 bytes a row, whatever the number of rows (docs/data.md)."""
    num = 100_000
    contents = np.random.default_rng(0).integers(0, 2**63, num).astype(np.uint64)
    data = make_recipe(tmp_path, "a.jsonl").data
    origins = [Origin("sources", data.sources[0], 0, num)]
    tracemalloc.start()
    found = select(SimpleNamespace(column=lambda name: contents), origins, data, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, found.rows.values())) == num
    assert 60 < peak / num < 80


@pytest.mark.parametrize(
    ("asked", "is_told"),
    [
        ({"eval_fraction": 0.2}, True),
        ({"eval_fraction": 0.0, "test_fraction": 0.2}, True),
        ({"eval_fraction": 0.2, "near_duplicates": "together"}, False),
        ({"eval_fraction": 0.2, "near_duplicates": "drop"}, False),
        ({"eval_fraction": 0.0}, False),
        ({"eval_fraction": 0.0, "eval_sources": ["e.jsonl"]}, False),
    ],
    ids=["eval", "test", "together", "drop", "nothing held out", "given"],
)
def test_that_nobody_looks_for_near_duplicates_of_a_drawn_split_is_told_once(tmp_path, tokenizer, asked, is_told):
    write_lines(tmp_path / "e.jsonl", records(2, "held out {}"))
    asked = asked | {"eval_sources": [{"path": str(tmp_path / name)} for name in asked.get("eval_sources", ())]}
    lines: list[str] = []
    prepare(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", MIXED), **asked), tokenizer, notice=lines.append)
    assert sum("data.near_duplicates=together" in line for line in lines) == is_told
