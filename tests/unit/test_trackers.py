"""Trackers get every value, continue after a resume, never hold a run up, never see a secret. The real packages."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError
from sft_dist.observe import trackers as trackers_module
from sft_dist.observe.metrics import MetricsLog, read_metrics
from sft_dist.observe.trackers import Line, Trackers, check_trackers, without_secrets

PATIENCE = 120.0  # seconds for what a crowded machine does in a few
SECRET = "hf_s3cr3tt0ken"


def recipe(*names: str) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "tracked"},
            "model": {"path": "m"},
            "data": {"sources": [{"path": f"https://user:{SECRET}@host/data.jsonl?key={SECRET}"}]},
            "log": {"trackers": list(names), "project": "prov", "group": "nightly"},
        }
    )


def attempt(run_dir: Path, wanted: Recipe, steps: range) -> list[str]:
    """What an attempt tells the user; raises nothing."""
    told: list[str] = []
    log = MetricsLog(run_dir, Trackers(run_dir, wanted, told.append))
    for step in steps:
        log.evaluation(step, 2.0 / step, 7, by_source={"a": 1.0 / step})
    log.close()
    return told


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET * 3)
    yield
    import wandb

    wandb.teardown()


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_keeps_its_run_through_a_resume_and_sees_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_dist.observe.trackers.CLOSE_SECONDS", PATIENCE)
    for steps in (range(1, 3), range(3, 5)):
        assert attempt(tmp_path, recipe("wandb"), steps) == []
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(f"-{known}" in folder.name for folder in folders)
    written = contents(tmp_path / "wandb")
    for word in (b"eval/eval_loss", b"eval/by_source/a", b"nightly", b"tracked", b"https://host/data.jsonl"):
        assert word in written
    assert SECRET.encode() not in contents(tmp_path)


def test_mlflow_continues_its_run_and_has_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.observe.trackers.CLOSE_SECONDS", PATIENCE)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for steps in (range(1, 60), range(60, 71)):
        assert attempt(tmp_path, recipe("mlflow", "tensorboard"), steps) == []
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("prov").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.data.tags["group"] == "nightly"
    assert run.data.params["data.sources.0.path"] == "https://host/data.jsonl"
    history = client.get_metric_history(run.info.run_id, "eval/eval_loss")
    assert {point.step: point.value for point in history} == {step: 2.0 / step for step in range(1, 71)}
    assert SECRET.encode() not in contents(tmp_path) and list((tmp_path / "tensorboard").iterdir())


def test_a_service_that_is_away_is_told_once_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://name:{SECRET}@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (told,) = attempt(tmp_path, recipe("mlflow"), range(1, 50))
    assert told.startswith("warning: tracker mlflow: ") and "the run goes on" in told and SECRET not in told
    assert len(read_metrics(tmp_path)) == 49


class Stuck:
    """A service that accepts a connection and never answers."""

    def __init__(self, until: threading.Event, seen: list[Line]) -> None:
        self._until, self._seen = until, seen

    def write(self, lines: Sequence[Line]) -> None:
        self._until.wait()
        self._seen.extend(lines)

    def close(self) -> None:
        raise RuntimeError("never reached")


@pytest.mark.timeout(30)
def test_a_stuck_service_never_holds_up_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, seen = threading.Event(), []
    monkeypatch.setitem(trackers_module._OPENERS, "mlflow", lambda run_dir, recipe: Stuck(answer, seen))
    monkeypatch.setattr(trackers_module, "MOST_QUEUED", 100)
    monkeypatch.setattr(trackers_module, "CLOSE_SECONDS", 0.0)
    told: list[str] = []
    trackers = Trackers(tmp_path, recipe("mlflow"), told.append)
    for step in range(1000):  # would wait for ever if a step waited
        trackers.log(step, {"step/loss": 1.0, "step/bad": float("nan")})
    trackers.close()
    assert len(told) == 1 and "100 lines behind" in told[0]
    answer.set()


@pytest.mark.parametrize("error", [RuntimeError("no\nroom"), SystemExit("left"), KeyboardInterrupt()], ids=repr)
def test_whatever_a_tracker_raises_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setitem(trackers_module._OPENERS, "wandb", fail)
    assert len(attempt(tmp_path, recipe("wandb", "tensorboard"), range(1, 5))) == 1
    assert len(read_metrics(tmp_path)) == 4 and list((tmp_path / "tensorboard").iterdir())


def test_a_package_that_is_not_there_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(recipe("wandb", "mlflow", "tensorboard"))
    monkeypatch.setitem(trackers_module._MODULES, "wandb", "wandb_that_nobody_has")
    with pytest.raises(ConfigError, match=r"log\.trackers=wandb: not installed: pip install 'sft_dist\[trackers\]'"):
        check_trackers(recipe("wandb"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pw@host/x", "https://host/x"),
        ("https://host/x?sig=1&key=2 and more", "https://host/x and more"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_addresses_lose_what_is_secret(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
