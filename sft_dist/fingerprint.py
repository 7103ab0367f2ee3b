"""A run's fingerprint.json: what it was made from, written by the first attempt and compared by all later ones."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_dist.config.auto import Choices
from sft_dist.config.identity import identity, read_fingerprint
from sft_dist.config.loader import load_resolved
from sft_dist.config.schema import Recipe
from sft_dist.data.plan import PackPlan
from sft_dist.data.planning import train_plan
from sft_dist.data.stream_plan import StreamPlan
from sft_dist.errors import CheckpointError, DataError
from sft_dist.inputs import Inputs, read_inputs

VERSIONED = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors")


def make_fingerprint(
    inputs: Inputs, choices: Choices, plan: PackPlan | StreamPlan, frozen: str | None, run: str | None
) -> dict[str, Any]:
    """The name of the run, which its checkpoints carry; what must not change between attempts (`recipe`, `inputs`),
    what `auto` became, and versions for the record."""
    return {
        "run": run,
        "recipe": identity(inputs.recipe),
        "inputs": data_fingerprint(inputs, plan) | {"frozen weights": frozen},
        "choices": choices.as_dict(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }


def data_fingerprint(inputs: Inputs, plan: PackPlan | StreamPlan) -> dict[str, Any]:
    """Hashes of what the steps are made from."""
    data, template = inputs.data, inputs.data.template
    return {
        "data.train": data.train.fingerprint,
        "data.eval": data.eval.fingerprint if data.eval is not None else None,
        "template": hashlib.sha256(template.text.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(inputs.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "plan": plan.digest,
    }


def reopen(run_dir: Path, notice: Callable[[str], None]) -> tuple[Inputs, Choices, PackPlan | StreamPlan]:
    """What the run in `run_dir` is made from, proven to be what it recorded; no model is loaded.

    Raises CheckpointError when it is no run folder or its record is damaged, DataError when its data changed.
    """
    path = run_dir / "fingerprint.json"
    try:
        recorded = read_fingerprint(run_dir)
        if recorded is None or not (run_dir / "config.yaml").is_file():
            raise CheckpointError(f"{run_dir}: holds no config.yaml and fingerprint.json, so it is no run folder")
        choices, before = Choices(**recorded["choices"]), dict(recorded["inputs"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: altered ({error}); restore it from a copy") from error
    inputs = read_inputs(load_resolved(run_dir / "config.yaml"), notice)
    plan = train_plan(inputs.recipe, choices, inputs.data.train)
    for key, value in data_fingerprint(inputs, plan).items():
        if before.get(key) != value:
            raise DataError(
                f"{key} is {value} today, {run_dir} was trained with {before.get(key)}: restore what it was made from"
            )
    return inputs, choices, plan


def explain_inputs(recipe: Recipe) -> dict[str, str]:
    """What the hashed inputs are made from, for the one line that refuses a change."""
    data, model = recipe.data, recipe.model
    paths = {role: ", ".join(s.path for s in getattr(data, role)) for role in ("sources", "eval_sources")}
    return {
        "data.train": f"the training examples from {paths['sources']}",
        "data.eval": f"the validation examples from {paths['eval_sources'] or paths['sources']}",
        "template": f"data.chat_template={data.chat_template}",
        "tokenizer": f"the files of {model.tokenizer or model.path}",
        "frozen weights": f"the weights of {model.path} that are not trained",
    }
