"""What a recipe asks to leave out is left out, counted and listed, before anything is held out."""

from __future__ import annotations

import json
import re
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
    """About 94 bytes a row, whatever the number of rows (docs/data.md)."""
    num = 100_000
    contents = np.random.default_rng(0).integers(0, 2**63, num).astype(np.uint64)
    data = make_recipe(tmp_path, "a.jsonl").data
    origins = [Origin("sources", data.sources[0], 0, num)]
    tracemalloc.start()
    found = select(SimpleNamespace(column=lambda name: contents), origins, data, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, found.rows.values())) == num
    assert 80 < peak / num < 100


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


FORMS = """forms:
  - {name: one, prompt: "Is {{ word }} a word?", answer: "{{ label }}"}
  - {name: two, prompt: "{{ word }}: yes or no?", answer: "{{ label }}"}
  - {name: three, prompt: "What is {{ word }}?", answer: "{{ label }}"}
"""


def tree(number: int) -> dict:
    replies = [{"role": "assistant", "text": f"answer {number} {n}", "replies": []} for n in range(3)]
    root = {"role": "prompter", "text": f"question {number}", "replies": replies}
    return {"message_tree_id": str(number), "prompt": root}


def instances(number: int) -> dict:
    given = [{"input": f"{number} {n}", "output": f"answer {number} {n}"} for n in range(3)]
    return {"instruction": f"Task {number}", "instances": given}


SEVERAL = {
    "forms": (lambda n: {"word": f"word{n}", "label": "yes"}, {"format": "template"}),
    "threads": (tree, {}),
    "instances": (instances, {}),
    "outputs": (lambda n: {"definition": "Say.", "input": f"{n}", "output": [f"a{n}", f"b{n}", f"c{n}"]}, {}),
    "pieces": (lambda n: row(f"question {n}", f"{n:04} " * 90), {}),
}


@pytest.mark.parametrize("near", ["ignore", "together", "drop"])
@pytest.mark.parametrize("name", SEVERAL)
def test_no_record_stands_on_both_sides_of_a_split(tmp_path, tokenizer, name, near):
    make, asked = SEVERAL[name]
    (tmp_path / "forms.yaml").write_text(FORMS)
    path = write_lines(tmp_path / "a.jsonl", map(make, range(40)))
    source = {"path": str(path)} | asked | ({"template": str(tmp_path / "forms.yaml")} if "format" in asked else {})
    fractions = {"eval_fraction": 0.2, "test_fraction": 0.1, "near_duplicates": near, "long_examples": "split"}
    data = prepare(make_recipe(tmp_path, source, **fractions), tokenizer, notice=said)
    trained, held, tested = (set(map(record_of, split)) for split in (data.train, data.eval, data.test))
    assert not (trained & held or trained & tested or held & tested)
    if near != "drop":
        assert len(data.eval) == 0.2 * data.report.sources[0].accepted and len(data.train) > len(trained)


def record_of(example) -> str:
    return re.match(r"\d+", example.id.removeprefix(f"{example.source}:"))[0]


def test_a_record_that_two_sources_read_in_different_forms_is_on_one_side(tmp_path, tokenizer):
    path = str(write_lines(tmp_path / "a.jsonl", map(SEVERAL["forms"][0], range(40))))
    for number, form in enumerate(FORMS.splitlines()[1:3]):
        (tmp_path / f"{number}.yaml").write_text(f"forms:\n{form}\n")
    sources = [{"path": path, "format": "template", "template": str(tmp_path / f"{n}.yaml")} for n in range(2)]
    data = prepare(make_recipe(tmp_path, *sources, eval_fraction=0.2), tokenizer, notice=said)
    assert len(data.eval) == 16 and not {one.id for one in data.train} & {one.id for one in data.eval}


def test_the_instances_of_a_task_file_are_shared_out(tmp_path, tokenizer):
    """One record of many examples that do not depend on each other: what has one input stays together."""
    given = [{"input": f"input {n}", "output": [f"a{n}", f"b{n}"]} for n in range(50)]
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"Definition": ["Say it."], "Instances": given}))
    data = prepare(make_recipe(tmp_path, path, eval_fraction=0.2), tokenizer, notice=said)
    asked = [{text.split("input ")[1].split("<")[0] for text in decoded(s, tokenizer)} for s in (data.train, data.eval)]
    assert len(data.eval) == 20 and len(asked[1]) == 10 and not asked[0] & asked[1]


def test_rows_elsewhere_move_no_record(tmp_path, tokenizer):
    """Another source, another order of lines and another number of workers leave every record where it was."""
    trees = [tree(n) for n in range(40)]
    one = {"path": str(write_lines(tmp_path / "a.jsonl", trees))}
    other = {"path": str(write_lines(tmp_path / "b.jsonl", records(70)))}
    turned = {"path": str(write_lines(tmp_path / "c.jsonl", trees[::-1]))}
    sides = [
        {text for text in decoded(prepare(recipe, tokenizer, notice=said).eval, tokenizer) if "question" in text}
        for recipe in (
            make_recipe(tmp_path, one, eval_fraction=0.2),
            make_recipe(tmp_path, turned, eval_fraction=0.2, workers=1),
            make_recipe(tmp_path, other, one, eval_fraction=0.2),
        )
    ]
    of_trees = [{text for text in side if "answer number" not in text} for side in sides]
    assert len(of_trees[0]) == 24 and of_trees[0] == of_trees[1] == of_trees[2]


def notices(recipe, tokenizer) -> list[str]:
    lines: list[str] = []
    prepare(recipe, tokenizer, notice=lines.append)
    return lines


def test_what_cannot_be_torn_apart_is_told(tmp_path, tokenizer):
    single = write_lines(tmp_path / "a.jsonl", [tree(0)])
    lines = notices(make_recipe(tmp_path, single, eval_fraction=0.2, test_fraction=0.2), tokenizer)
    for key, name in (("eval", "validation"), ("test", "test")):
        told = f"data.{key}_fraction=0.2: no {name} split, 3 examples make 1 group that no split may tear apart"
        assert any(line.startswith(told) for line in lines)
    many = write_lines(tmp_path / "b.jsonl", records(100))
    lines = notices(make_recipe(tmp_path, single, many, eval_fraction=0.2), tokenizer)
    assert sum(f"nothing of {single} is held out, 3 examples make 1 group" in line for line in lines) == 1
    assert not any("held out, 100" in line for line in lines)


@pytest.mark.parametrize("key", ["eval_sources", "test_sources"])
def test_an_evaluation_source_without_a_usable_example_is_told(tmp_path, tokenizer, key):
    given = write_lines(tmp_path / "e.jsonl", records(3, "much too long " * 40))
    other = write_lines(tmp_path / "f.jsonl", records(3, "fine {}"))
    asked = {"eval_fraction": 0.0, key: [{"path": str(given)}, {"path": str(other)}]}
    lines = notices(make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", records(9)), **asked), tokenizer)
    assert [line for line in lines if "no usable example" in line] == [
        f"warning: data.{key} path={given}: no usable example, nothing of it is measured"
    ]


def test_a_score_is_asked_of_training_rows_alone(tmp_path, tokenizer):
    rows = records(6)
    source = write_lines(tmp_path / "a.jsonl", [r | {"score": n} for n, r in enumerate(rows)])
    held = write_lines(tmp_path / "e.jsonl", [r | {"score": 0} for r in records(3, "held {}")])
    asked = {
        "filters": {"score": {"column": "score", "min": 3}},
        "eval_fraction": 0.0,
        "eval_sources": [{"path": str(held)}],
        "test_sources": [{"path": str(source)}],
    }
    data = prepare(make_recipe(tmp_path, source, **asked), tokenizer, notice=said)
    assert (len(data.train), len(data.eval), len(data.test)) == (3, 3, 6)
    assert [counts.score for counts in data.report.sources] == [3, 0, 0]


@pytest.mark.parametrize(
    ("filters", "told"),
    [
        (
            {"score": {"column": "scor", "min": 1}},
            [
                "0 trainable examples of 6 records (6 left out by data.filters.score); lower its min",
                "a.jsonl has it, did you mean 'score'? (there are instruction, output, score)",
            ],
        ),
        ({"score": {"column": "score", "min": 9}}, ["(6 left out by data.filters.score); lower its min or check"]),
        ({"min_answer_tokens": 99}, ["(6 left out by data.filters.min_answer_tokens); relax data.filters.min_answer"]),
    ],
    ids=["no such column", "too high", "rule"],
)
def test_what_left_nothing_to_train_is_named(tmp_path, tokenizer, filters, told):
    rows = [r | {"score": n} for n, r in enumerate(records(6))]
    recipe = make_recipe(tmp_path, write_lines(tmp_path / "a.jsonl", rows), filters=filters)
    with pytest.raises(DataError) as error:
        prepare(recipe, tokenizer, notice=said)
    assert all(part in str(error.value) for part in told)
    assert "did you mean" in str(error.value) or len(told) == 1


def test_a_source_without_the_score_is_told(tmp_path, tokenizer):
    scored = write_lines(tmp_path / "a.jsonl", [r | ({"score": 5} if n else {}) for n, r in enumerate(records(6))])
    plain = write_lines(tmp_path / "b.jsonl", records(6, "other {}"))
    asked = {"filters": {"score": {"column": "score", "min": 1}}, "eval_fraction": 0.0}
    lines = notices(make_recipe(tmp_path, scored, plain, **asked), tokenizer)
    assert [line for line in lines if "column=" in line] == [
        f"data.filters.score.column=score: no record of {plain} has it (there are instruction, output)"
    ]


def test_scores_of_text_cells_are_numbers(tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,score\n" + "".join(f"question {n},answer {n},{n}.5\n" for n in range(6)))
    asked = {"filters": {"score": {"column": "score", "min": 2.5}}, "eval_fraction": 0.0}
    assert len(prepare(make_recipe(tmp_path, path, **asked), tokenizer, notice=said).train) == 4
