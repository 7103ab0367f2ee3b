"""The final artefact: a folder that stock Transformers (or PEFT, for an adapter) loads without this project.

Weights go shard by shard into safetensors, with the tokenizer that carries the chat template of the training and the
generation config that carries its stop tokens. Everything is written into a fresh folder beside the target, made
durable, and renamed: a half-written export never has the name.
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sft_dist.checkpoint.catalog import find
from sft_dist.checkpoint.disk import check_space, fsync_path, rename_fresh, storage_errors
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.checkpoint.shards import empty_tensors, num_bytes, read_shards, spread
from sft_dist.config.schema import Recipe
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.models.adapters import apply_tuning, is_adapter
from sft_dist.models.load import DTYPES, load_model
from sft_dist.models.packed import causal_lm

SHARD_BYTES = 5 << 30
WEIGHTS_PREFIX = "model."


def export_model(
    state: Mapping[str, Tensor],
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    template_text: str,
    generation_config: GenerationConfig | None,
    out: str | Path,
    peft_config: Any | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Path:
    """Write the model of `state` (full tensors on the CPU, by the model's own names) to the folder `out`.

    With `peft_config` only the adapter's tensors are written, under the names PEFT loads. An existing `out` is replaced
    once the new one is complete. Raises StorageError when it cannot be written.
    """
    tensors = adapter_tensors(state) if peft_config is not None else model_tensors(state, hf_config)
    out = Path(out)
    partial = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, num_bytes(tensors))
        partial.mkdir()
        try:
            if peft_config is not None:
                _write_adapter(partial, tensors, peft_config)
            else:
                _write_weights(partial, tensors)
                _loadable_config(hf_config, tensors).save_pretrained(partial)
            _write_words(partial, tokenizer, template_text, generation_config, stop_token_ids)
            _give_users_modes(partial)
            _replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return out


def export_from_checkpoint(
    run_dir: str | Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    template_text: str,
    out: str | Path,
    *,
    step: int | None = None,
    merge: bool = False,
    stop_token_ids: Sequence[int] = (),
) -> Path:
    """Export the checkpoint of `step` (None: the newest good one) of a run; `merge` folds an adapter into its base.

    `recipe` is the run's own. Merging is done in fp32 and stored in the run's compute dtype. Raises CheckpointError
    when the checkpoint is bad or absent, ConfigError when there is nothing to merge.
    """
    folder = find(run_dir, step)
    if merge and recipe.tuning.method == "full":
        raise ConfigError(f"--merge: {run_dir} tuned all weights (tuning.method=full), there is no adapter to merge")
    compute = _compute_dtype(Path(run_dir), recipe)
    model = _rebuild(recipe, len(tokenizer), compute=compute, base=torch.float32 if merge else None)
    _fill(model, folder)
    if merge:
        model = model.merge_and_unload().to(compute)  # type: ignore[operator]
    lm = causal_lm(model)
    return export_model(
        model.state_dict(),
        lm.config,
        tokenizer,
        template_text,
        lm.generation_config,
        out,
        peft_config=model.peft_config["default"] if is_adapter(model) else None,  # type: ignore[index]
        stop_token_ids=stop_token_ids,
    )


def model_tensors(state: Mapping[str, Tensor], hf_config: PretrainedConfig) -> dict[str, Tensor]:
    """`state` without the copies of tied weights: transformers ties them again when it loads."""
    tied = getattr(_model_class(hf_config), "_tied_weights_keys", None) or ()
    is_tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
    kept: dict[str, Tensor] = {}
    stored: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if not (is_tied and name in tied) and place not in stored:
            kept[name] = tensor.detach()
            stored.add(place)
    return kept


def adapter_tensors(state: Mapping[str, Tensor], adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors as PEFT names them: no adapter name, `modules_to_save` in their modules' places."""
    kept = {}
    for name, tensor in state.items():
        if f".modules_to_save.{adapter}." in name:
            kept[name.replace(f".modules_to_save.{adapter}.", ".")] = tensor.detach()
        elif ".lora_" in name and f".{adapter}" in name:
            kept[name.replace(f".{adapter}", "", 1)] = tensor.detach()
    return kept


def _write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """`model.safetensors`, or numbered shards of about 5 GiB with their index."""
    numbers = spread(tensors, SHARD_BYTES)
    total = max(numbers.values())
    files = {
        n: f"model-{n:05d}-of-{total:05d}.safetensors" if total > 1 else "model.safetensors" for n in numbers.values()
    }
    for number, file in files.items():
        part = {name: tensors[name].contiguous() for name in tensors if numbers[name] == number}
        save_file(part, folder / file, metadata={"format": "pt"})
    if total > 1:
        weight_map = {name: files[number] for name, number in numbers.items()}
        index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_adapter(folder: Path, tensors: Mapping[str, Tensor], peft_config: Any) -> None:
    part = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(part, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    stored = copy.deepcopy(peft_config)
    stored.inference_mode = True
    stored.save_pretrained(folder)


def _write_words(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template_text: str,
    generation_config: GenerationConfig | None,
    stop_token_ids: Sequence[int],
) -> None:
    """Tokenizer with the training's chat template, and how to generate with it."""
    speaker = copy.deepcopy(tokenizer)
    speaker.chat_template = template_text
    speaker.save_pretrained(folder)
    generation = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    if stop_token_ids:
        generation.eos_token_id = list(stop_token_ids) if len(stop_token_ids) > 1 else stop_token_ids[0]
    if generation.pad_token_id is None:
        generation.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    generation.use_cache = True
    if any(
        getattr(generation, name, None) not in (None, plain) for name, plain in (("temperature", 1.0), ("top_p", 1.0))
    ):
        generation.do_sample = True  # sampling settings without it are refused by transformers when saving
    generation.save_pretrained(folder)


def _loadable_config(hf_config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> PretrainedConfig:
    """The config as a reader wants it: cache on, class named, dtype of what is stored."""
    config = copy.deepcopy(hf_config)
    config.use_cache = True
    config.architectures = config.architectures or [_model_class(config).__name__]
    config.dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    return config


def _model_class(config: PretrainedConfig) -> type:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), nn.Module)


def _give_users_modes(folder: Path) -> None:
    """safetensors writes files that only their owner can read; a shared folder's umask says otherwise.

    The folder itself was made under that umask, and reading it from there, not by setting it, disturbs no thread.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.iterdir():
        path.chmod(mode)


def _replace(partial: Path, out: Path) -> None:
    """Make `partial` durable and give it the name `out`; a former folder of that name goes afterwards."""
    for path in partial.iterdir():
        fsync_path(path)
    fsync_path(partial)
    former = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    if out.exists():
        out.rename(former)
    rename_fresh(partial, out)
    fsync_path(out.parent)
    shutil.rmtree(former, ignore_errors=True)


def _compute_dtype(run_dir: Path, recipe: Recipe) -> torch.dtype:
    """The dtype the run computed in: what `auto` meant is in its fingerprint."""
    record = run_dir / "fingerprint.json"
    chosen = json.loads(record.read_text())["choices"]["compute"] if record.is_file() else recipe.precision.compute
    return DTYPES.get(chosen, torch.float32)


def _rebuild(recipe: Recipe, vocab_size: int, *, compute: torch.dtype, base: torch.dtype | None) -> nn.Module:
    """The run's model as it was before its first step; `base` overrides the dtype of the untrained weights."""
    master = DTYPES[recipe.precision.master]
    dtype = base or (master if recipe.tuning.method == "full" else compute)
    model = load_model(recipe.model, dtype=dtype, seed=recipe.run.seed, vocab_size=vocab_size)
    tuned = apply_tuning(model, recipe.tuning, recipe.run.seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    return tuned


def _fill(model: nn.Module, folder: Path) -> None:
    """Put the checkpoint's weights into the parameters of the same names."""
    loaded = empty_tensors(read_manifest(folder), WEIGHTS_PREFIX)
    read_shards(folder, loaded)
    parameters = dict(model.named_parameters())
    for name, tensor in loaded.items():
        parameter = parameters.get(name.removeprefix(WEIGHTS_PREFIX))
        if parameter is None or parameter.shape != tensor.shape:
            raise CheckpointError(f"{folder}: {name} does not fit the model that the run's config.yaml describes")
        parameter.data = tensor.to(parameter.dtype)
