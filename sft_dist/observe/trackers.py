"""TensorBoard, W&B and MLflow beside metrics.jsonl, each in a thread of its own: a run never waits for one.

    trackers = Trackers(run_dir, recipe, say)      # each is opened in its thread
    trackers.log(12, {"step/loss": 1.5})           # into a queue
    trackers.close()                               # what is queued goes out, for at most CLOSE_SECONDS

A tracker that cannot be opened, fails or falls behind is told once and gets nothing more; metrics.jsonl has everything.
Run ids stand in RUN_DIR/trackers.json, so that a resumed run continues the same curves. Keys and tokens come from the
environment and the libraries' own files; none is read, stored or sent by us, and addresses lose what is secret in them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sft_dist.config.identity import flatten
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

RECORD = "trackers.json"
CLOSE_SECONDS = 20.0  # a preempted job has little more
MOST_QUEUED = 10_000  # lines: hours of a service that is away
BATCH_LINES = 50
_MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^?\s]+)\?\S+")

Line = tuple[int, dict[str, float]]  # step, values by name


class Sink(Protocol):
    """One open tracker."""

    def write(self, lines: Sequence[Line]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run. One writer: rank 0."""

    def __init__(self, run_dir: Path, recipe: Recipe, notice: Callable[[str], None]) -> None:
        self._all = [
            _Background(name, partial(_OPENERS[name], run_dir, recipe), notice) for name in recipe.log.trackers
        ]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers only: what services make of NaN differs."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in self._all:
            tracker.log((step, finite))

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._all:
            tracker.finish()
        for tracker in self._all:
            tracker.join(deadline - time.monotonic())


def check_trackers(recipe: Recipe) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in recipe.log.trackers:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(f"log.trackers={name}: not installed: pip install 'sft_dist[trackers]', or leave it out")


def without_secrets(text: str) -> str:
    """`https://user:token@host/x?key=1` becomes `https://host/x`."""
    return _QUERY.sub(r"\1", _USER_INFO.sub("", text))


class _Background:
    """A tracker's thread and its queue."""

    def __init__(self, name: str, open_: Callable[[], Sink], notice: Callable[[str], None]) -> None:
        self._name, self._open, self._notice = name, open_, notice
        self._lines: queue.Queue[Line | None] = queue.Queue(MOST_QUEUED)
        self._is_dead = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        if self._is_dead:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._die(f"{MOST_QUEUED} lines behind")

    def finish(self) -> None:
        if not self._is_dead:
            self._lines.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive() and not self._is_dead:
            self._die(f"not done {CLOSE_SECONDS:.0f} s after the end")

    def _work(self) -> None:
        try:
            sink = self._open()
            is_last = False
            while not is_last:
                lines, is_last = self._next()
                if lines:
                    sink.write(lines)
            sink.close()
        except BaseException as error:  # whatever a tracker does in its thread, the run goes on
            self._die(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")

    def _next(self) -> tuple[list[Line], bool]:
        """What is queued, at least one line; whether it was the end."""
        lines: list[Line] = []
        item = self._lines.get()
        while item is not None:
            lines.append(item)
            if len(lines) == BATCH_LINES or self._lines.empty():
                return lines, False
            item = self._lines.get()
        return lines, True

    def _die(self, reason: str) -> None:
        if not self._is_dead:
            self._is_dead = True
            self._notice(
                f"warning: tracker {self._name}: {without_secrets(reason)}; it gets nothing more and the run goes on, "
                f"metrics.jsonl has every value"
            )


class _TensorBoard:
    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, lines: Sequence[Line]) -> None:
        for step, values in lines:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The axis is our own `step`: a resume that goes back some steps repeats values, which are the same to the bit."""

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        import wandb

        known = _run_id(run_dir, "wandb") or _remember(run_dir, "wandb", secrets.token_hex(4))
        self._run: Any = wandb.init(
            id=known,
            resume="allow",
            project=recipe.log.project,
            group=recipe.log.group,
            name=recipe.run.name,
            dir=str(run_dir),
            config=_settings(recipe),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, lines: Sequence[Line]) -> None:
        for step, values in lines:
            self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """Where MLFLOW_TRACKING_URI says, else into files of the run folder."""

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # 3.x wants to hear that files are meant
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlflow").absolute().as_uri()
        self._client: Any = MlflowClient(uri)
        known = _run_id(run_dir, "mlflow")
        if known is None:
            tags = {"group": recipe.log.group} if recipe.log.group else {}
            created = self._client.create_run(self._experiment(recipe), run_name=recipe.run.name, tags=tags)
            known = _remember(run_dir, "mlflow", created.info.run_id)
            params = [Param(key, str(value)[:500]) for key, value in _settings(recipe).items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(known, params=params[first : first + 100])
        else:
            self._client.update_run(known, status="RUNNING")
        self._id = known

    def write(self, lines: Sequence[Line]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for step, values in lines for name, value in values.items()]
        for first in range(0, len(metrics), 1000):  # the service's own limit
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _experiment(self, recipe: Recipe) -> str:
        name = recipe.log.project or "sft_dist"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


_OPENERS: dict[str, Callable[[Path, Recipe], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of the resolved recipe; addresses without user, password and query."""
    flat = flatten(recipe.model_dump(mode="json"))
    return {key: without_secrets(value) if isinstance(value, str) else value for key, value in flat.items()}


def _run_id(run_dir: Path, tracker: str) -> str | None:
    path = run_dir / RECORD
    return json.loads(path.read_text()).get(tracker) if path.exists() else None


_RECORDING = threading.Lock()


def _remember(run_dir: Path, tracker: str, run_id: str) -> str:
    """Keep the id for later attempts, whole or not at all."""
    path = run_dir / RECORD
    with _RECORDING:
        known = json.loads(path.read_text()) if path.exists() else {}
        partial_file = path.with_suffix(".tmp")
        partial_file.write_text(json.dumps(known | {tracker: run_id}, indent=2) + "\n")
        partial_file.rename(path)
    return run_id
