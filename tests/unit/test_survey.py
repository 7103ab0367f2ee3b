"""The survey of prepared data: figures by hand on small sets, real sets as a user has them."""

import io
import json

import pytest
from rich.console import Console

from sft_dist.cli.data_stats import show_survey
from sft_dist.data.prepare import prepare
from sft_dist.data.survey import survey
from tests.preparing import byte_tokenizer, make_recipe, said, write_lines

TOKENIZER = byte_tokenizer()
STORY = "Once upon a time there was a fox who lived under the old oak near the river and feared nobody."


def look(folder, rows, most_rows=200_000, held_out=(), **data):
    sources = [write_lines(folder / "a.jsonl", rows)]
    if held_out:
        data["eval_sources"] = [{"path": str(write_lines(folder / "held.jsonl", held_out))}]
    recipe = make_recipe(folder, *sources, **({"eval_fraction": 0.0, "seq_len": 4096} | data))
    prepared = prepare(recipe, TOKENIZER, notice=said)
    stores = {name: getattr(prepared, name) for name in prepared.report.splits}
    return survey(stores, prepared.template, TOKENIZER, seed=0, most_rows=most_rows)


def row(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def test_figures_by_hand(tmp_path):
    found = look(
        tmp_path,
        [
            row("Write a story.", STORY),
            row("Write a story.", STORY + "!"),
            row("Write a poem.", "No."),
            row("Напиши рассказ.", "Жил-был лис, и никого он не боялся, кроме одной старой совы."),
        ],
    )
    assert found.tasks == [("write", "story", 2), ("write", "poem", 1)]
    assert (found.num_instructions, found.num_tasks, found.num_without_task) == (4, 2, 1)
    assert found.scripts == {"Latin": 3, "Cyrillic": 1}
    assert found.answers_per_conversation == {1: 4}
    assert [place.row for place in found.findings["short"].places] == [2]
    assert [[place.row for place in cluster] for cluster in found.near.clusters] == [[0, 1]]
    assert [[place.row for place in cluster] for cluster in found.questions.clusters] == [[0, 1]]
    assert found.findings["short"].places[0].id.endswith("a.jsonl:3")
    assert sum(found.lengths["answer, tokens"]["counts"]) == 4
    json.dumps(found.as_dict())


def test_near_duplicates_across_splits_are_warned_about(tmp_path):
    rows = [row("Write a story.", STORY), row("What is the capital of Germany?", "Berlin is its capital.")]
    held_out = [
        row("Write a story.", STORY + "."),
        row("What is the capital of Germany?", "The town of Berlin, I say."),
    ]
    found = look(tmp_path, rows, held_out=held_out)
    (leak,) = found.leaks
    assert (leak.split, leak.rows, leak.exact, leak.near, leak.same_question) == ("eval", 2, 0, 1, 2)
    assert leak.places[0].row == 0
    assert "warning: 1 of 2 eval examples are near-duplicates of training examples" in found.notices[0]


def test_rows_that_ask_nothing_are_not_alike(tmp_path):
    found = look(tmp_path, [{"text": STORY}], held_out=[{"text": "Quite another text."}])
    assert found.leaks[0].same_question == 0
    assert found.num_instructions == 0 and found.tasks == []


def test_a_repeated_row_is_looked_at_once(tmp_path):
    source = {"path": str(write_lines(tmp_path / "b.jsonl", [row("Write a story.", STORY)])), "weight": 3.0}
    recipe = make_recipe(tmp_path, source, eval_fraction=0.0)
    prepared = prepare(recipe, TOKENIZER, notice=said)
    found = survey({"train": prepared.train}, prepared.template, TOKENIZER, seed=0)
    assert len(prepared.train) == 3
    assert (found.looked_at, found.examples) == ({"train": 1}, {"train": 3})
    assert found.exact.num_rows == found.near.num_rows == 0


def test_large_splits_are_sampled_and_it_is_said(tmp_path):
    rows = [row(f"Write story number {number}.", STORY[:number]) for number in range(4, 64)]
    found, again = (look(tmp_path, rows, most_rows=20) for _ in range(2))
    assert found == again
    assert found.looked_at == {"train": 20} and found.examples == {"train": 60}
    assert "train: a seeded sample of 20 of 60 examples" in found.notices[0]


def test_a_template_without_a_frame_is_told(tmp_path):
    template = tmp_path / "once.jinja"
    template.write_text(
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
        "Q: {{ messages[0].content }} A: {{ messages[1].content }}{{ eos_token }}"
    )
    found = look(tmp_path, [row("Write a story.", STORY)], chat_template=str(template))
    assert "could not be told" in found.notices[0]


def test_the_near_duplicates_of_a_real_set(shared, tmp_path):
    """Published for this exercise (Raschka, LLMs from scratch, chapter 7): one row stands in it twice."""
    rows = json.loads((shared / "data/instruct/rasbt_instruction_examples.json").read_text())
    found = look(tmp_path, rows)
    assert found.exact.num_rows == found.near.num_rows == found.questions.num_rows == 2
    assert {place.text for place in found.near.clusters[0]} == {"Name a dwarf planet in our solar system."}


@pytest.mark.slow
def test_seventeen_thousand_rows_take_well_under_a_minute(shared, tmp_path):
    import time

    recipe = make_recipe(
        tmp_path,
        shared / "data/instruct/alpaca_subset.json.gz",
        seq_len=8192,
        on_bad_record="skip",
        chat_template="alpaca",
    )
    prepared = prepare(recipe, TOKENIZER, notice=said)
    stores = {name: getattr(prepared, name) for name in prepared.report.splits}
    begun = time.perf_counter()
    found = survey(stores, prepared.template, TOKENIZER, seed=0)
    assert time.perf_counter() - begun < 60
    assert sum(found.looked_at.values()) == 17_387 - 9
    assert found.exact.num_rows == 0
    assert found.num_tasks > 3000 and found.num_without_task < 0.02 * found.num_instructions
    assert found.findings["odd_characters"].count == 2


def test_a_piece_is_shown_with_its_file_and_line(tmp_path):
    found = look(tmp_path, [row("Go on.", "again and again and " * 40)], seq_len=256, long_examples="split")
    console = Console(record=True, width=120, file=io.StringIO())
    show_survey(console, found)
    assert "train row 0 · a.jsonl:1/1 · Go on." in console.export_text()
