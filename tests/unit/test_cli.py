"""The command line: verbs, settings in every spelling, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import sft_dist
from sft_dist.cli import main as cli
from sft_dist.cli import train as cli_train
from sft_dist.config.shipped import CHECKOUT
from sft_dist.errors import DataError, LockedError
from sft_dist.launch import local

RECIPE = "model: {path: gpt2}\ndata: {sources: [{path: x.json}]}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of each test, with a recipe and its data file."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    Path("x.json").write_text("[]")
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Records the arguments of each local launch instead of starting processes."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(local, "run", lambda *args: calls.append(args) or 75)
    return calls


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    assert f"sft-dist {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["r.yaml", "optim.lr=1e-4", "--nproc", "2"],
        ["r.yaml", "--nproc", "2", "optim.lr=1e-4"],
        ["--nproc=2", "r.yaml", "--optim.lr", "1e-4"],
        ["optim.lr=1e-4", "--nproc", "2", "r.yaml"],
        ["--optim.lr=1e-4", "r.yaml", "--nproc", "2"],
    ],
)
def test_train_takes_recipes_settings_and_options_in_any_order(
    arguments: list[str], started: list[tuple[object, ...]]
) -> None:
    assert cli.main(["train", *arguments]) == 75
    assert started == [(["r.yaml"], ["optim.lr=1e-4"], 2, False)]


def test_train_inside_a_launcher_is_a_worker(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[object, ...]]
) -> None:
    seen: list[list[str]] = []
    worker = SimpleNamespace(main=lambda argv: seen.append(list(argv)) or 0)
    monkeypatch.setattr(sft_dist, "worker", worker, raising=False)  # the real one imports torch
    monkeypatch.setattr(cli_train, "run_and_end", lambda main: sys.exit(main()))  # the real one would end pytest
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--local_rank=0", "r.yaml", "--optim.lr", "1e-4"])
    assert left.value.code == 0
    assert seen == [["r.yaml", "optim.lr=1e-4"]] and started == []


@pytest.mark.parametrize(
    ("environ", "inside"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),  # a batch script, no step
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SFT_NNODES": "2"}, False),  # a node's launcher
    ],
)
def test_launchers_are_known_by_their_environment(environ: dict[str, str], inside: bool) -> None:
    assert cli_train.inside_launcher(environ) is inside


def test_dry_run_prints_the_resolved_recipe_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "r.yaml", "optim.epochs=7", "--nproc", "2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "  epochs: 7\n" in text and "# 2 x " in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.sources.0.path=missing/*.json", "data.sources.0.path = missing/*.json: no such file, folder or pattern"),
        ("data.eval_sources=[{path: y.json}]", "data.eval_sources.0.path = y.json: no such file"),
        ("model.path=./models/none", "model.path = ./models/none: no such folder, and not a hub id"),
        ("model.tokenizer=a/b/c", "model.tokenizer = a/b/c: no such folder"),
        ("data.chat_template=my.jinja", "data.chat_template = my.jinja: no such file"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--dry-run"], ["config", "check"]], ids=" ".join)
def test_files_that_are_not_there(
    command: list[str], setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "r.yaml", setting]) == 2
    assert f"sft-dist: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian: unknown verb: did you mean 'train'?"),
        (["frobnicate"], "frobnicate: unknown verb: the verbs are quickstart, train,"),
        ([], "the following arguments are required: VERB: see sft-dist --help"),
        (["train"], "the following arguments are required: RECIPE.yaml|key=value: see sft-dist train --help"),
        (
            ["train", "r.yaml", "--epochs", "3"],
            "--epochs: not an option of this command: settings are written optim.epochs=VALUE",
        ),
        (
            ["train", "r.yaml", "--packing"],
            "--packing: not an option of this command: settings are written data.packing=VALUE",
        ),
        (["train", "r.yaml", "--learning_rate", "3"], "learning_rate is the name of another tool: write optim.lr=3"),
        (["train", "r.yaml", "--optim.lr"], "--optim.lr: the value is missing: write optim.lr=VALUE"),
        (
            ["train", "r.yaml", "--nproc", "two"],
            "argument --nproc: invalid int value: 'two': see sft-dist train --help",
        ),
        (["train", "r.yaml", "--dry"], "--dry: not an option of this command"),
        (["train", "none.yaml"], "none.yaml: no such recipe"),
        (["config", "show", "r.yaml", "optim.lrr=1"], "command line: optim.lrr: unknown key: did you mean 'optim.lr'?"),
        (["config", "diff", "r.yaml", "r.yaml", "r.yaml"], "config diff compares one or two recipes, not 3"),
    ],
)
def test_usage_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sft-dist: error: ") and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize("error", [DataError("no rows"), LockedError("held by 42")], ids=["data", "locked"])
def test_errors_of_a_verb_end_in_their_exit_code(
    error: DataError | LockedError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> int:
        raise error

    monkeypatch.setattr(local, "run", fail)
    assert cli.main(["train", "r.yaml"]) == error.exit_code
    assert capsys.readouterr().err == f"sft-dist: error: {error}\n"
    assert cli.main(["train", "r.yaml", "--traceback"]) == error.exit_code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_config_show_is_a_recipe_with_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "r.yaml", "optim.epochs=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  epochs: 7") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("  path: gpt2") and line.endswith("# r.yaml:1") for line in lines)
    assert cli.main(["config", "show", "--json", "r.yaml"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"]["model"]["path"] == "gpt2" and shown["origins"]["optim.lr"] == "default"


def test_config_diff_against_defaults_and_another_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(RECIPE + "optim: {lr: 1e-4}\n")
    assert cli.main(["config", "diff", "r.yaml", "s.yaml", "run.seed=3"]) == 0
    assert capsys.readouterr().out == 'run.seed  0 -> 3\noptim.lr  "auto" -> 0.0001\n'
    assert cli.main(["config", "diff", "s.yaml", "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert changes["optim.lr"] == {"old": "auto", "new": 1e-4} and changes["model.path"] == {"old": None, "new": "gpt2"}
    assert "optim.epochs" not in changes


def test_config_check_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "check", "r.yaml"]) == 0
    assert capsys.readouterr().out.startswith("ok: 2 settings given")
    assert cli.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "sft-dist recipe"


def test_a_reader_that_leaves_early_ends_the_command_quietly() -> None:
    """As in `python -m sft_dist config show R.yaml | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sft_dist", "config", "show", "configs/alpaca_full.yaml"]
    done = subprocess.run(command, cwd=CHECKOUT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
