"""The quickstart around its training run: what it clears, what it refuses, what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist.cli import main as cli
from sft_dist.cli.before_after import answers_table, read_pairs, skills_table
from sft_dist.cli.quickstart import renew
from sft_dist.config.loader import dump_recipe, load_recipe
from sft_dist.errors import ConfigError, LockedError
from sft_dist.launch import job, local
from sft_dist.observe.answers import scores
from sft_dist.resilience.lock import RunLock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of each test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Records how the local launch is called instead of starting processes; the run ends with 75."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(local, "run", lambda *args: calls.append(args) or 75)
    return calls


def recipe(*overrides: str):
    return load_recipe(["configs/quickstart.yaml"], overrides)


def test_two_processes_where_there_is_no_gpu(started, monkeypatch) -> None:
    monkeypatch.setattr(job, "count_gpus", lambda environ: 0)
    assert cli.main(["quickstart", "optim.lr=1e-3", "--examples", "40"]) == 75
    assert started == [(["configs/quickstart.yaml"], ["optim.lr=1e-3"], 2, False)]
    assert len(Path("runs/quickstart-data/train.jsonl").read_text().splitlines()) == 40


def test_one_process_per_gpu(started, monkeypatch) -> None:
    monkeypatch.setattr(job, "count_gpus", lambda environ: 4)
    cli.main(["quickstart", "--examples", "40"])
    assert started[0][2] == 4


def test_an_earlier_quickstart_is_cleared() -> None:
    run_dir = Path("runs/quickstart")
    (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run_dir / "summary.json").write_text("{}")
    (run_dir / "config.yaml").write_text(dump_recipe(recipe()))
    renew(recipe(), 40)
    assert [path.name for path in run_dir.iterdir()] == ["lock"]


def test_any_other_folder_is_left_alone() -> None:
    thesis = Path("runs/quickstart/thesis.tex")
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else than a quickstart"):
        renew(recipe(), 40)
    (thesis.parent / "config.yaml").write_text(dump_recipe(recipe("run.name=mine")))
    with pytest.raises(ConfigError, match="holds something else than a quickstart"):
        renew(recipe(), 40)
    assert thesis.read_text() == "years of work"


def test_a_quickstart_at_work_is_not_disturbed(monkeypatch) -> None:
    monkeypatch.setattr("sft_dist.resilience.lock.WAIT_SECONDS", 0.0)
    with RunLock.acquire("runs/quickstart", wait_seconds=0):
        acquire = RunLock.acquire
        monkeypatch.setattr(RunLock, "acquire", lambda run_dir: acquire(run_dir, wait_seconds=0))
        with pytest.raises(LockedError):
            renew(recipe(), 40)
    assert not Path("runs/quickstart-data").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["mine.yaml"], "quickstart has its own recipe"), (["--examples", "0"], "--examples 0: must be at least 1")],
    ids=["a recipe", "no examples"],
)
def test_refusals_are_one_line(arguments, text, started, capsys) -> None:
    assert cli.main(["quickstart", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert not started


def test_the_recipe_fits_its_own_tokenizer_and_data() -> None:
    from sft_dist.generate.skills import vocabulary_texts
    from sft_dist.generate.tokenizer import END, PAD, build_tokenizer

    tokenizer, config = build_tokenizer(vocabulary_texts()), recipe().model.config
    assert config is not None
    assert len(tokenizer) <= config["vocab_size"] < len(tokenizer) + 16
    assert tokenizer.convert_tokens_to_ids([PAD, END]) == [config["pad_token_id"], config["eos_token_id"]]


def records(held_out: Path) -> list[dict[str, object]]:
    """exact_match.jsonl of three held-out questions, of which the tuned model gets two right."""
    answers = {"before": ["fig fig fig", "", "no"], "after": ["2", "fig kiwi", "yes"]}
    return [
        {"phase": phase, "id": f"{held_out}:{line}", "prompt": "", "reference": reference, "answer": answer}
        | {"match": answer == reference}
        for phase, said in answers.items()
        for line, (reference, answer) in enumerate(zip(["2", "kiwi fig", "yes"], said, strict=True), 1)
    ]


@pytest.fixture
def held_out(folder: Path) -> Path:
    asked = [
        ("count", "Count these: fig hat"),
        ("reverse", "Reverse: fig kiwi"),
        ("member", "Is fig here? [red]fig[/]"),
    ]
    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "?"}], "skill": skill}
        for skill, text in asked
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def shown(table) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_of_skills_ends_in_the_total(held_out: Path) -> None:
    rows = [line.split()[:3] for line in shown(skills_table(scores(records(held_out)))).splitlines()[2:]]
    assert rows == [
        ["count", "0%", "100%"],
        ["member", "0%", "100%"],
        ["reverse", "0%", "0%"],
        ["all", "0%", "67%"],
    ]


def test_answers_are_shown_right_or_wrong_and_as_plain_text(held_out: Path) -> None:
    pairs = read_pairs(records(held_out))
    assert [(pair.skill, pair.expected, pair.base, pair.tuned) for pair in pairs] == [
        ("count", "2", "fig fig fig", "2"),
        ("member", "yes", "no", "yes"),
        ("reverse", "kiwi fig", "", "fig kiwi"),
    ]
    text = shown(answers_table(pairs))
    assert "Is fig here? [red]fig[/]" in text  # no mark-up of the data is obeyed
    assert "fig fig fig" in text


def test_a_conversation_is_shown_with_who_spoke(folder: Path) -> None:
    said = [("user", "My name is Ana."), ("assistant", "Hello."), ("user", "Who am I?"), ("assistant", "Ana")]
    line = {"messages": [{"role": role, "content": text} for role, text in said], "skill": "recall"}
    (folder / "chat.jsonl").write_text(json.dumps(line) + "\n")
    both = [
        {"phase": phase, "id": f"{folder}/chat.jsonl:1", "reference": "Ana", "answer": "Ana", "match": True}
        for phase in ("before", "after")
    ]
    (pair,) = read_pairs(both)
    assert pair.question == "user: My name is Ana.\nassistant: Hello.\nuser: Who am I?"
