"""From files and settings to a recipe: precedence, values, errors with their place, and back to text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft_dist.config.export import annotate_recipe, settings
from sft_dist.config.loader import dump_recipe, json_schema, load_recipe, load_resolved, origins
from sft_dist.config.overrides import split_arguments
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

LEAST = ("model.path=gpt2", "data.sources.0.path=x.json")
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write(text, name)` puts a recipe into the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "r.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return put


def load(*overrides: str) -> Recipe:
    return load_recipe([], [*LEAST, *overrides])


def complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_defaults_then_files_left_to_right_then_settings(write: Write) -> None:
    a = write(
        "model: {path: gpt2}\ndata: {sources: [{path: x.json}], seq_len: 64}\noptim: {lr: 1e-4, epochs: 5}\n", "a.yaml"
    )
    b = write("optim: {epochs: 7, eps: 1e-6}\n", "b.yaml")
    recipe = load_recipe([a, b], ["optim.eps=1e-7"])
    assert (recipe.optim.lr, recipe.optim.epochs, recipe.optim.eps, recipe.data.seq_len) == (1e-4, 7, 1e-7, 64)
    assert recipe.tuning.rank == 16


def test_later_lists_replace_earlier_ones(write: Write) -> None:
    a = write("model: {path: gpt2}\ndata: {sources: [{path: x}, {path: y}]}\n", "a.yaml")
    b = write("data: {sources: [{path: z}]}\n", "b.yaml")
    assert [source.path for source in load_recipe([a, b]).data.sources] == ["z"]


def test_a_section_without_lines_changes_nothing(write: Write) -> None:
    a = write("model: {path: gpt2}\ndata: {sources: [{path: x}]}\noptim: {epochs: 5}\n", "a.yaml")
    assert load_recipe([a, write("optim:\n#  epochs: 9\n", "b.yaml")]).optim.epochs == 5


def test_list_entries_are_set_by_index() -> None:
    recipe = load("data.sources.0.weight=2", "data.sources.1.path=y.json")
    assert [(source.path, source.weight) for source in recipe.data.sources] == [("x.json", 2.0), ("y.json", 1.0)]
    assert "data.sources.4: the list holds 1: use an index up to 1" in complaint("data.sources.4.path=z")


def test_free_mappings_take_any_key() -> None:
    recipe = load(
        "model.init=random", "model.config={model_type: llama, rope: [1, 2.5, null]}", "model.config.hidden_size=64"
    )
    assert recipe.model.config == {"model_type": "llama", "rope": [1, 2.5, None], "hidden_size": 64}


@pytest.mark.parametrize("word", ["auto", "reference"])
def test_one_word_chooses_all_kernels(word: str) -> None:
    assert load(f"kernels={word}").kernels.head == word
    assert load("kernels=reference", "kernels.head=triton").kernels.head == "triton"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=auto", "auto"),
        ("batch.tokens_per_step=65_536", 65_536),
        ("run.deterministic=true", True),
        ("run.name=no", "no"),
        ("run.name=0123", "0123"),
        ("run.dir=1:30", "1:30"),
        ("model.revision=1234567890", "1234567890"),
        ("model.revision=12e4567890", "12e4567890"),
        ("model.revision=null", None),
        ("model.revision=", None),
        ("model.tokenizer='null'", "null"),
        ("data.cache_dir=a: b #c", "a: b #c"),
        ("optim.betas=[0.9, 0.95]", [0.9, 0.95]),
        ("tuning.targets=[q_proj, 1]", ["q_proj", "1"]),
        ("tuning.freeze=[no]", ["no"]),
        ("data.eval_sources=[]", []),
    ],
)
def test_values_become_what_their_key_holds(setting: str, value: object) -> None:
    got = settings(load(setting))[setting.partition("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr=-1", "command line: optim.lr = -1: must be a number > 0, or auto"),
        ("optim.lr=.nan", "optim.lr = .nan: must be a number > 0"),
        (
            "optim.epochs=0123",
            'optim.epochs = 0123: a leading zero means octal to some and nothing to others: write 123, or "0123"',
        ),
        ("optim.epochs=1:30", "optim.epochs = 1:30: must be a whole number > 0"),
        ("optim.epochs=2.5", "optim.epochs = 2.5: must be a whole number > 0"),
        ("optim.epochs=true", "optim.epochs = true: must be a whole number > 0"),
        ("optim.epochs=null", "optim.epochs = null: must be a whole number > 0"),
        ("optim.betas=[0.9]", "optim.betas = [0.9]: must be a list of 2: a number >= 0 and < 1, a number >= 0 and < 1"),
        ("tuning.method=lroa", "tuning.method = lroa: must be full | lora | rslora | dora | qlora | "),
        ("log.trackers=[comet]", "must be a list, each entry tensorboard | wandb | mlflow"),
        ("run.name=a b", "run.name = a b: must be text like"),
        ("run.deterministic=maybe", "run.deterministic = maybe: must be true or false, or elastic"),
        ("data.seq_len=4", "data.seq_len = 4: must be a whole number >= 8"),
        ("data.sources=[]", "data.sources = []: must be a list (one or more)"),
        ("data.sources=x.json", "data.sources is a list: write data.sources: [{path: x.json}]"),
        ("data.sources=[x.json]", "data.sources.0: an entry is a mapping: write {path: x.json}"),
        ("data.sources={path: x.json}", "data.sources is a list: write data.sources: [{path: x.json}]"),
        ("batch=8", "batch is a section, not a value: its keys are tokens_per_micro_batch"),
        ("batch.tokens_per_step=3000", "batch.tokens_per_step=3000 must be a multiple of data.seq_len=2048"),
        ("model.config.tie_word_embeddings=no", 'model.config = no: is text in YAML 1.2: write true or false, or "no"'),
        ("model.path=", "model: path is missing"),
        ("hub.push_to=x", "hub.push_to = x: must be text like"),
        ("data.sources.0.streaming=true", "data.eval_fraction needs all rows at once, and data.sources are streamed"),
        ("weird=1", "weird: unknown key: the keys at the top are run, model,"),
        ("lr=1e-4", "lr: unknown key: did you mean 'optim.lr'?"),
        ("every_steps=5", "did you mean 'checkpoint.every_steps' or 'eval.every_steps' or 'log.every_steps'?"),
        ("optim..lr=1", "an empty name between the dots"),
        ("run.dir=\udcff", "not UTF-8"),
    ],
)
def test_a_mistake_names_key_value_and_rule(setting: str, message: str) -> None:
    assert message in complaint(setting)


def test_each_mistake_is_one_line_with_its_place(write: Write) -> None:
    name = write(
        "model:\n  path: gpt2\ndata:\n  sources:\n    - path: x\n      formt: alpaca\noptim:\n  lr: x\n  epochs: 0\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe([name], ["eval.generate=-1"])
    assert sorted(str(caught.value).splitlines()) == [
        "command line: eval.generate = -1: must be a whole number >= 0",
        "r.yaml:6: data.sources.0.formt: unknown key: did you mean 'data.sources.0.format'?",
        "r.yaml:8: optim.lr = x: must be a number > 0, or auto",
        "r.yaml:9: optim.epochs = 0: must be a whole number > 0",
    ]


def test_what_is_missing_is_named_with_the_file(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe([write("run: {name: x}\n")])
    text = str(caught.value)
    assert "r.yaml: model: path is missing" in text and "r.yaml: data.sources is missing" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {name: \xff}", "r.yaml: byte 12 is not UTF-8"),
        (b"a: " + b"x" * (1 << 20), "r.yaml: too large for a recipe"),
    ],
)
def test_files_that_are_no_recipes(write: Write, content: bytes, message: str) -> None:
    Path(write("")).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(["r.yaml"])


def test_a_byte_order_mark_is_no_part_of_the_first_key(write: Write) -> None:
    Path(write("")).write_bytes(b"\xef\xbb\xbfmodel: {path: gpt2}\n")
    assert load_recipe(["r.yaml"], LEAST[1:]).model.path == "gpt2"


def test_a_recipe_that_is_not_there(write: Write) -> None:
    write("", "alpaca.yaml")
    with pytest.raises(ConfigError, match=r"alpca\.yaml: no such recipe: did you mean 'alpaca.yaml'"):
        load_recipe(["alpca.yaml"])
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(["."])


def test_origins_name_the_last_writer(write: Write) -> None:
    a = write("model:\n  path: gpt2\ndata:\n  sources: [{path: x}]\noptim: {epochs: 5}\nkernels: reference\n", "a.yaml")
    b = write("\noptim:\n  epochs: 6\n", "b.yaml")
    where = origins([a, b], ["run.seed=3"])
    assert where["model.path"] == "a.yaml:2" and where["data.sources.0.path"] == "a.yaml:4"
    assert where["optim.epochs"] == "b.yaml:3" and where["run.seed"] == "command line"
    assert where["kernels.head"] == "a.yaml:6"
    assert where["optim.lr"] == "default" and where["data.sources.0.format"] == "default"


def test_annotated_text_is_the_recipe_with_comments(write: Write) -> None:
    recipe = load("optim.lr=2e-4")
    text = annotate_recipe(recipe, origins([], [*LEAST, "optim.lr=2e-4"]))
    assert any(line.startswith("  lr: 0.0002") and line.endswith("# command line") for line in text.splitlines())
    assert load_resolved(write(text)) == recipe


_text = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
_words = st.sampled_from(
    [
        "no",
        "~",
        "null",
        "1e-5",
        "0123",
        "1:30",
        "2024-01-01",
        "1_0",
        ".inf",
        "a: b",
        "# x",
        "- x",
        "{",
        "'",
        " x ",
        "<<",
        "=",
        "",
    ]
)
_scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | _text | _words
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text | _words, inner, max_size=4),
    max_leaves=12,
)


@hypothesis_settings(deadline=None)
@given(
    path=_text.filter(bool),
    columns=st.dictionaries(_text | _words, _text | _words, max_size=4),
    config=st.dictionaries(_text | _words, _trees, min_size=1, max_size=4),
    freeze=st.lists(_text | _words, max_size=4),
    lr=st.floats(1e-300, 1e300) | st.just("auto"),
)
def test_dumped_text_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    columns: dict[str, str],
    config: dict[str, Any],
    freeze: list[str],
    lr: float | str,
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"path": path, "config": config},
            "data": {"sources": [{"path": path, "columns": columns}, {"path": "b"}]},
            "tuning": {"freeze": freeze},
            "optim": {"lr": lr},
        }
    )
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_resolved(file) == recipe


def test_dumped_text_is_stable_and_readable() -> None:
    text = dump_recipe(load())
    assert text.startswith("run:\n  name: run\n  dir: runs/run\n")
    assert "  sources:\n    - path: x.json\n      format: auto\n" in text


def test_schema_is_json_and_closed_at_every_level() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    assert {"enum": ["auto", "reference", "triton"]} in schema["properties"]["kernels"]["anyOf"]


@pytest.mark.parametrize(
    ("arguments", "files", "overrides"),
    [
        (["r.yaml", "a.b=1", "s.yaml"], ["r.yaml", "s.yaml"], ["a.b=1"]),
        (["--a.b", "1", "r.yaml", "--c.d=2"], ["r.yaml"], ["a.b=1", "c.d=2"]),
        (["r.yaml", "--lora_r", "-1"], ["r.yaml"], ["lora_r=-1"]),
        (["--local_rank=1", "r.yaml"], ["r.yaml"], []),
        (["--local-rank=1", "r.yaml"], ["r.yaml"], []),
        (["dir/a=b.yaml"], ["dir/a=b.yaml"], []),
        (["a.b=c=d"], [], ["a.b=c=d"]),
        (["a.b=x\ny"], [], ["a.b=x\ny"]),
    ],
)
def test_arguments_are_files_or_settings(arguments: list[str], files: list[str], overrides: list[str]) -> None:
    assert split_arguments(arguments) == (files, overrides)


def test_an_option_without_its_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--a\.b: the value is missing: write a\.b=VALUE"):
        split_arguments(["--a.b", "--c.d=1"])
    with pytest.raises(ConfigError, match="--verbose: not an option here"):
        split_arguments(["--verbose"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optim.betas=[0.9,2.0]"], "optim.betas = [0.9, 2.0]: must be a list of 2: a number >= 0 and < 1"),
        (["tuning.method=lora", "tuning.freeze=['x*']"], "tuning.freeze needs tuning.method=full"),
        (["data.eval_fraction=0", "eval.early_stopping=1"], "eval.early_stopping=1 needs validation data"),
        (["data.eval_fraction=0", "eval.exact_match=5"], "eval.exact_match=5 needs held-out data"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, settings: list[str], said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {path: m}\ndata: {sources: [{path: d.json}]}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_recipe([str(path)], settings)
