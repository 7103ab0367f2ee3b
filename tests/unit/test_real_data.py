"""Every real file reads, holds the known number of records, and what cannot be used is refused for the right reason.

What is learned of them is what their assistants say, and they say the same in every other kind of file.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from template_cases import byte_tokenizer

from sft_dist.config.schema import SourceSection
from sft_dist.data.formats import detect_format, rename_columns, to_conversations
from sft_dist.data.forms import load_forms
from sft_dist.data.records import Record
from sft_dist.data.sources import Rejects, read_records
from sft_dist.data.templates import resolve_template, spans
from sft_dist.errors import BadRecord, ConfigError
from sft_dist.types import Conversation, TokenizedExample

FLAN = {"columns": {"question": 0, "answer": 1, "rationale": 2}, "quotes": False, "escapes": True}
EMPTY, PLACEHOLDER, MEDIA, NULL = "field 'output' is empty", "placeholder", "multimodal", "'instruction' must be text"

# file -> (format, records, conversations, reason -> records refused for it)
FILES: dict[str, tuple[str, int, int, dict[str, int]]] = {
    "alpaca_random_9k.json.gz": ("alpaca", 9229, 9225, {EMPTY: 4}),
    "alpaca_seed_tasks.jsonl": ("self_instruct", 175, 175, {}),
    "alpaca_subset.json.gz": ("alpaca", 17387, 17378, {EMPTY: 9}),
    "axolotl_alpaca_fixture.json": ("alpaca", 2, 2, {}),
    "code_alpaca_2k.json": ("alpaca", 2017, 2015, {EMPTY: 2}),
    "fastchat_dummy_conversation.json": ("sharegpt", 500, 500, {}),
    "flan_cot_aqua_train.tsv.gz": ("chain_of_thought", 2728, 2728, {}),
    "flan_cot_qasc_train.tsv.gz": ("chain_of_thought", 1084, 1084, {}),
    "flan_cot_strategyqa_train.tsv.gz": ("chain_of_thought", 2061, 2061, {}),
    "gsm8k_train.jsonl.gz": ("question_answer", 7473, 7473, {}),
    "lf_alpaca_en_demo.json": ("alpaca", 999, 999, {}),
    "lf_alpaca_zh_demo.json": ("alpaca", 1000, 1000, {}),
    "lf_glaive_toolcall_en_demo.json": ("sharegpt", 300, 300, {}),
    "lf_identity.json": ("alpaca", 91, 6, {PLACEHOLDER: 85}),
    "lf_mllm_demo.json": ("messages", 6, 0, {MEDIA: 6}),
    "lf_reason_tool_use_demo_50.jsonl": ("messages", 50, 50, {}),
    "lf_v1_sft_demo.jsonl": ("messages", 500, 450, {PLACEHOLDER: 50}),
    "natural_instructions_v2_60per.jsonl.gz": ("natural_instructions", 5220, 7685, {}),
    "oasst_en_100_tree.jsonl": ("oasst", 100, 626, {}),
    "p3_t0_16per_template.jsonl.gz": ("prompt_completion", 4480, 4480, {}),
    "pt_mt_bench_messages.jsonl": ("messages", 80, 80, {}),
    "rasbt_instruction_data.json": ("alpaca", 1100, 1100, {}),
    "rasbt_instruction_data_llama3.json": ("alpaca", 5, 4, {NULL: 1}),
    "rasbt_instruction_data_with_preference.json": ("alpaca", 1100, 1100, {}),
    "rasbt_instruction_data_with_response.json": ("alpaca", 110, 110, {}),
    "rasbt_instruction_examples.json": ("alpaca", 200, 200, {}),
    "ru_alpaca_seed_tasks.jsonl": ("self_instruct", 137, 137, {}),
}
PLAIN_TEXTS = ("lf_c4_demo.jsonl", 300)  # file of corpus/, records
FLAT = ("alpaca", "chain_of_thought", "prompt_completion", "question_answer")  # formats whose fields are all text
NUM_TOKENISED, NUM_WRITTEN = 50, 100  # conversations, records: the first of a file
BYTES = byte_tokenizer()
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
THOUGHT = re.compile(r"(?:<think>\n(.*?)\n</think>\n\n)?(.*)", re.DOTALL)

LETTERED = {"label": ["A", "B", "C", "D"], "text": ["w", "x", "y", "z"]}
PAIR = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1}
# A record of each labelled data set, with the fields that it has on the hub, and how many forms leave it out.
LABELLED: dict[str, tuple[dict[str, Any], int]] = {
    "ag_news": ({"text": "t", "label": 1}, 0),
    "amazon_polarity": ({"title": "t", "content": "c", "label": 1}, 0),
    "common_gen": ({"concepts": ["ski", "mountain"], "target": "They ski."}, 0),
    "commonsense_qa": ({"question": "q", "choices": LETTERED, "answerKey": "B"}, 0),
    "dbpedia_14": ({"title": "t", "content": "c", "label": 3}, 0),
    "dream": ({"dialogue": ["M: a", "W: b"], "question": "q", "choice": ["x", "y", "z"], "answer": "y"}, 0),
    "gigaword": ({"document": "d", "summary": "s"}, 0),
    "glue__cola": ({"sentence": "s", "label": 1}, 0),
    "glue__mrpc": (PAIR, 0),
    "glue__qqp": ({"question1": "a", "question2": "b", "label": 0}, 0),
    "glue__rte": (PAIR, 0),
    "glue__sst2": ({"sentence": "s", "label": 1}, 0),
    "imdb": ({"text": "t", "label": 0}, 0),
    "openbookqa__main": ({"question_stem": "q", "choices": LETTERED, "answerKey": "C"}, 0),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, 0),
    "qasc": (
        {
            "question": "q?",
            "choices": {"label": list("ABCDEFGH"), "text": list("stuvwxyz")},
            "answerKey": "H",
            "fact1": "f",
            "fact2": "g",
            "combinedfact": "h",
        },
        0,
    ),
    "quarel": ({"question": "q", "world_literals": {"world1": ["a"], "world2": ["b"]}, "answer_index": 1}, 0),
    "quartz": (
        {"para": "p", "question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        0,
    ),
    "rotten_tomatoes": ({"text": "t", "label": 0}, 0),
    "samsum": ({"dialogue": "d", "summary": "s"}, 0),
    "sciq": (
        {
            "question": "q",
            "support": "s",
            "correct_answer": "c",
            "distractor1": "1",
            "distractor2": "2",
            "distractor3": "3",
        },
        0,
    ),
    "super_glue__boolq": ({"passage": "p", "question": "q", "label": 1}, 0),
    "super_glue__copa": ({"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}, 2),
    "super_glue__rte": ({"premise": "p", "hypothesis": "h", "label": 0}, 0),
    "super_glue__wic": ({"word": "w", **PAIR}, 0),
    "trec": ({"text": "t", "coarse_label": 4, "fine_label": 33}, 9),
    "wiki_bio": (
        {"input_text": {"context": "c", "table": {"column_header": ["name"], "content": ["x"]}}, "target_text": "t"},
        0,
    ),
    "xsum": ({"document": "d", "summary": "s"}, 0),
}


def known_counts(shared: Path, folder: str) -> dict[str, int]:
    """File -> records, as the tables of the data's own README say."""
    rows = re.findall(
        rf"^\| `{folder}/(\S+)` \| (\d+) \| \d+ \|", (shared / "data/README.md").read_text(), re.MULTILINE
    )
    return {file: int(count) for file, count in rows}


def source_of(shared: Path, name: str) -> SourceSection:
    return SourceSection(path=str(shared / "data/instruct" / name), **(FLAN if name.startswith("flan") else {}))


def some_records(source: SourceSection) -> list[Record]:
    """The first records of a source."""
    return list(islice(read_records(source, Rejects()), NUM_WRITTEN))


def conversations(records: Sequence[Record], source: SourceSection | None = None) -> list[Conversation]:
    """Of the records that can be used."""
    found: list[Conversation] = []
    for record in records:
        with suppress(BadRecord):
            found += to_conversations(record, "auto", source.columns if source else {})
    return found


def said(records: Sequence[Record], source: SourceSection) -> list[Any]:
    """What the records say, whatever file they stand in."""
    found: list[Any] = []
    for record in records:
        try:
            found += [(one.messages, one.tools) for one in to_conversations(record, "auto", source.columns)]
        except BadRecord:
            found.append("refused")  # with another reason where a null became a field that is not there
    return found


def tokenised(talks: Sequence[Conversation], template_name: str = "chatml") -> list[TokenizedExample]:
    template = resolve_template(template_name, BYTES)
    return [template.tokenize(talk, BYTES, loss_on="assistant") for talk in talks]


def learned(example: TokenizedExample) -> list[str]:
    """The supervised text, piece by piece."""
    return [BYTES.decode(example.input_ids[start:end]) for start, end in spans(example.loss_weights)]


def write_cells(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """A table with names in its first row, or without where columns are numbered."""
    names = list(dict.fromkeys(name for value in values for name in value))
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, names, restval="", quoting=csv.QUOTE_ALL)
        if names[0] != "0":
            rows.writeheader()
        rows.writerows(values)


def write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    path.write_bytes(pa.compress(text.encode(), "zstd", asbytes=True))


def table_of(values: Sequence[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for value in values for name in value)
    return pa.table({name: [value.get(name) for value in values] for name in names})


def write_arrow(path: Path, values: Sequence[dict[str, Any]]) -> None:
    table = table_of(values)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], None]] = {
    "parquet": lambda path, values: pq.write_table(table_of(values), path),
    "arrow": write_arrow,
    "jsonl.zst": write_lines,
    "csv": write_cells,
}


@pytest.mark.parametrize("name", FILES)
def test_an_instruction_file(shared: Path, name: str) -> None:
    format, num_records, num_conversations, refused = FILES[name]
    source = source_of(shared, name)
    total, formats, ids, reasons = 0, set(), set(), Counter[str]()
    for record in read_records(source, Rejects()):
        total += 1
        formats.add(detect_format(rename_columns(record.value, source.columns)))
        try:
            ids |= {one.id for one in to_conversations(record, "auto", source.columns)}
        except BadRecord as error:
            reasons[next((key for key in refused if key in error.reason), error.reason)] += 1
    assert total == num_records == known_counts(shared, "instruct")[name]
    assert (formats, len(ids), dict(reasons)) == ({format}, num_conversations, refused)


def test_no_file_is_left_out(shared: Path) -> None:
    held = {file.name for file in (shared / "data/instruct").iterdir()}
    assert held - FILES.keys() == {"alpaca_prompt.txt"}
    with pytest.raises(ConfigError, match="not a kind of file that is read"):
        list(read_records(str(shared / "data/instruct/alpaca_prompt.txt"), Rejects()))
    assert {file.stem for file in (shared / "data/prompts").rglob("*.yaml")} == LABELLED.keys()


def test_written_out_line_ends_of_flan_become_line_ends(shared: Path) -> None:
    source = source_of(shared, "flan_cot_qasc_train.tsv.gz")
    (found,) = to_conversations(next(iter(read_records(source, Rejects()))), "auto", source.columns)
    assert isinstance(found, Conversation)
    question, answer = (message.content for message in found.messages)
    assert question.splitlines()[1:3] == ["Options:", "- (A) DNA"]
    assert answer.startswith("Reproduction is the process")
    assert answer.endswith(".\nThe answer is (D).")


@pytest.mark.parametrize("name", LABELLED)
def test_a_file_of_forms(shared: Path, name: str) -> None:
    value, num_left_out = LABELLED[name]
    forms = load_forms(str(shared / f"data/prompts/promptsource/{name}.yaml"))
    assert len(forms.forms) == known_counts(shared, "prompts")[f"promptsource/{name}.yaml"]
    skipped: list[str] = []
    found = to_conversations(Record(value, "f", 1, 0), "template", {}, forms, skipped.append)
    assert (len(found), len(skipped)) == (len(forms.forms) - num_left_out, num_left_out)


def test_the_forms_of_copa_that_ask_for_effects_are_left_out_for_causes(shared: Path) -> None:
    forms = load_forms(str(shared / "data/prompts/promptsource/super_glue__copa.yaml"))
    left_out = []
    for question in ("cause", "effect"):
        skipped: list[str] = []
        found = list(forms.conversations(LABELLED["super_glue__copa"][0] | {"question": question}, skipped.append))
        assert len(found) + len(skipped) == 12
        left_out.append(set(skipped))
    assert left_out[0] == {
        "form '…What could happen next, C1 or C2?' leaves the prompt empty",
        "form '…As a result, C1 or C2?' leaves the prompt empty",
    }
    assert left_out[1]
    assert not left_out[0] & left_out[1]


def test_plain_texts_are_learned_whole(shared: Path) -> None:
    name, num_records = PLAIN_TEXTS
    path = shared / "data/corpus" / name
    records = list(read_records(str(path), Rejects()))
    assert len(records) == num_records == known_counts(shared, "corpus")[name]
    assert {detect_format(record.value) for record in records} == {"text"}
    talks = conversations(records[:NUM_TOKENISED])
    examples = tokenised(talks)
    assert [learned(example) for example in examples] == [[talk.messages[0].content + "</s>"] for talk in talks]


@pytest.mark.parametrize("name", [name for name in FILES if name != "lf_mllm_demo.json"])
def test_what_is_learned_of_a_file_is_what_its_assistants_say(shared: Path, name: str) -> None:
    source = source_of(shared, name)
    thinks = name == "lf_reason_tool_use_demo_50.jsonl"
    template = str(shared / "data/chat_templates/trl/qwen3.jinja") if thinks else "chatml"
    talks = conversations(some_records(source), source)[:NUM_TOKENISED]
    assert talks
    thoughts: list[str] = []
    for talk, example in zip(talks, tokenised(talks, template), strict=True):
        answers = [message for message in talk.messages if message.role == "assistant" and message.weight != 0]
        for text, answer in zip(learned(example), answers, strict=True):
            thought, written = THOUGHT.fullmatch(text.removesuffix("<|im_end|>")).groups()
            assert text.endswith("<|im_end|>"), talk.id
            assert (thought or "").strip() in ("", answer.extra.get("reasoning_content", "").strip()), talk.id
            thoughts += [thought] if thought and thought.strip() else []
            called = [call["function"] for call in answer.extra.get("tool_calls", ())]
            found = [json.loads(call) for call in CALL.findall(written)]
            assert found == [{"name": call["name"], "arguments": call["arguments"]} for call in called], talk.id
            beside = CALL.sub("", written).rstrip("\n") if called else written
            assert beside == answer.content, talk.id
    assert bool(thoughts) == thinks


@pytest.mark.parametrize("name", FILES)
def test_the_same_records_say_the_same_in_every_kind_of_file(shared: Path, tmp_path: Path, name: str) -> None:
    source = source_of(shared, name)
    records = some_records(source)
    expected, values = said(records, source), [record.value for record in records]
    kinds = dict(WRITERS)
    if any(not isinstance(cell, str) for value in values for cell in value.values()):
        del kinds["csv"]  # text alone fits in cells
    assert ("csv" in kinds) == (FILES[name][0] in FLAT and NULL not in FILES[name][3])
    for kind, write in kinds.items():
        path = tmp_path / f"x.{kind}"
        write(path, values)
        again = list(
            read_records(source.model_copy(update={"path": str(path), "quotes": True, "escapes": False}), Rejects())
        )
        assert len(again) == len(values), kind
        assert said(again, source) == expected, kind
