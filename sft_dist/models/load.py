"""From a recipe to a tokenizer and an unpatched Hugging Face causal LM.

Weights come from safetensors only. `init: random` builds the architecture named by `model.config` from a seed that
does not depend on rank or world size, so every process starts from the same tensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.utils.logging as transformers_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from sft_dist.config.schema import ModelSection
from sft_dist.errors import ConfigError
from sft_dist.models.vocabulary import grow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

transformers_logging.disable_progress_bar()  # every rank would draw its own
# The new names exist since transformers 5.2x only; PEFT and we speak to older ones too.
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing\w*` is deprecated", category=FutureWarning)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of `model.path`. Never adds tokens.

    Raises ConfigError when there is none, or only a slow one (loss masks need character offsets).
    """
    path = model.tokenizer or model.path
    if path is None:
        raise ConfigError(
            "model.tokenizer is missing: init: random without model.path needs a tokenizer folder or hub id"
        )
    if (Path(path) / "config.yaml").is_file():
        raise ConfigError(f"{path}: is a run folder; its model is {Path(path) / 'export'} once the run is finished")
    if Path(path).is_file():
        raise ConfigError(f"model.tokenizer={path}: is a file; name the folder that holds tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=_revision(model, path), trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.tokenizer={path}: no tokenizer found there ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.tokenizer={path}: only a slow tokenizer; loss masks need one with tokenizer.json")
    return tokenizer


def load_config(model: ModelSection) -> PretrainedConfig:
    """The architecture: `model.config` for random weights, else the config beside the weights."""
    if model.config is not None:
        return _config_from_recipe(model.config)
    if Path(str(model.path)).is_file():
        raise ConfigError(f"model.path={model.path}: is a file; name the folder that holds config.json and weights")
    try:
        return AutoConfig.from_pretrained(
            model.path, revision=_revision(model, model.path), trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: no model config found there ({first_line(error)})") from error


def load_model(
    model: ModelSection, *, dtype: torch.dtype, seed: int, vocab_size: int, num_added: int = 0
) -> PreTrainedModel:
    """The model on the CPU in `dtype`, `use_cache` off, in training mode.

    `vocab_size` is the tokenizer's: a model that cannot embed its largest id is refused, unless what is missing is
    among the last `num_added` ids, which get new rows (`models.vocabulary`).
    """
    config = load_config(model)
    if model.init == "random":
        network = build_random(config, dtype=dtype, seed=seed, trust_remote_code=model.trust_remote_code)
    else:
        network = _load_pretrained(model, dtype)
    grow(network, vocab_size, num_added)
    network.config.use_cache = False  # a cache object makes transformers drop document boundaries silently
    return network.train()


def build_random(
    config: PretrainedConfig, *, dtype: torch.dtype, seed: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Random weights, a pure function of (config, seed); the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def first_line(error: BaseException) -> str:
    """The first line of an upstream message: enough to know the cause, short enough for one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _load_pretrained(model: ModelSection, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=_revision(model, model.path),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path}: weights cannot be loaded ({first_line(error)})") from error


def _config_from_recipe(values: dict[str, Any]) -> PretrainedConfig:
    if "model_type" not in values:
        raise ConfigError("model.config.model_type is missing: name the architecture, for example llama or qwen3")
    values = dict(values)
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.config: {model_type} cannot be built ({first_line(error)})") from error


def _revision(model: ModelSection, path: str | None) -> str:
    """Local folders have no revision; hub ids take the pinned one."""
    return "main" if path is None or Path(path).exists() or model.revision is None else model.revision
