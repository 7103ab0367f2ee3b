"""The final artefact: a folder that stock Transformers (or PEFT, for an adapter) loads without this project.

Weights go out tensor by tensor (`weights`), with the tokenizer that carries the chat template of the training and the
generation config that carries its stop tokens. Everything is written into a fresh folder beside the target, proven by
re-opening it (`export_certificate`), made durable, and renamed: a half-written or a wrong export never has the name.
"""

from __future__ import annotations

import copy
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sft_dist.checkpoint.catalog import find
from sft_dist.checkpoint.disk import check_space, rename_fresh, storage_errors
from sft_dist.checkpoint.export_certificate import (
    Base,
    Certificate,
    Probe,
    Words,
    certify_adapter,
    certify_model,
    probe_ids,
    words_fault,
    write_record,
)
from sft_dist.checkpoint.merging import merged_weights, refuse_to_merge
from sft_dist.checkpoint.ranks import Ranks
from sft_dist.checkpoint.rebuild import base_of, compute_dtype, fill, rebuild
from sft_dist.checkpoint.weights import FILE_BYTES, Weight, Written, plain_weights, write_weights
from sft_dist.config.schema import Recipe
from sft_dist.durable import fsync_path
from sft_dist.errors import CertificateError, ConfigError
from sft_dist.models.adapters import ADAPTER, is_adapter
from sft_dist.models.packed import causal_lm

# Of the logits' 2-norm. The weights themselves are proven to the last bit, so these only have to tell rounding from a
# model that is put together wrongly. Measured: a merge in fp32 2e-6; bf16 against fp32 3e-3 (5 layers) to 3e-2 (80
# layers); two matrices of one kind exchanged 7e-2 to 1.5.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Package:
    """What a folder says about its weights."""

    config: PretrainedConfig
    generation_config: GenerationConfig | None
    words: Words
    peft_config: Any | None = None  # for an adapter: only its tensors are written, under the names PEFT loads
    base: Base | None = None  # for an adapter: what it is proven on
    remote_code: bool = False


def package_of(model: nn.Module, words: Words, base: Base | None = None, remote_code: bool = False) -> Package:
    """The package of a PreTrainedModel, or of a PeftModel as an adapter."""
    lm = causal_lm(model)
    peft_config = model.peft_config[ADAPTER] if is_adapter(model) else None  # type: ignore[index]
    return Package(lm.config, lm.generation_config, words, peft_config, base, remote_code)


def probe_limit(compute: torch.dtype, device: str, *, merged: bool = False) -> float:
    """How far an export's logits may be from the trained model's: nothing at all in fp32 on a CPU without a merge."""
    if compute == torch.float32 and device == "cpu" and not merged:
        return 0.0
    return LIMITS[compute] if device == "cpu" else LIMITS[torch.bfloat16]


def export_model(
    package: Package,
    weights: Mapping[str, Weight],
    out: str | Path,
    probe: Probe,
    *,
    file_bytes: int = FILE_BYTES,
    ranks: Ranks | None = None,
) -> Certificate | None:
    """Write the model of `weights` (the entries of its state dict) to the folder `out`, and prove it against `probe`.

    All ranks call with the same weights; rank 0 writes, and returns the certificate. A whole model is cut into files of
    at most `file_bytes`, an adapter is one file. An existing `out` is replaced once the new one is proven. Raises
    CertificateError (the older export stays) or StorageError, on all ranks.
    """
    ranks = ranks or Ranks()
    if package.peft_config is not None:
        stem, chosen = "adapter_model", adapter_tensors(weights)
        file_bytes = sys.maxsize  # PEFT reads one file and no index
    else:
        stem, chosen = "model", model_tensors(weights, package.config)
    out = Path(out)
    partial_folder = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    with _cleaned_up(partial_folder):
        with ranks.together(), storage_errors(out):
            if ranks.is_main:
                out.parent.mkdir(parents=True, exist_ok=True)
                check_space(out.parent, sum(weight.num_bytes for weight in chosen.values()))
                partial_folder.mkdir()
        with ranks.together(), storage_errors(out):
            written = write_weights(partial_folder, stem, chosen, file_bytes=file_bytes, writes=ranks.is_main)
        certificate = None
        with ranks.together(), storage_errors(out):
            if ranks.is_main:
                _describe(partial_folder, package, written)
                certificate = _proven(partial_folder, out, package, written, probe)
                _give_users_modes(partial_folder)
                _replace(partial_folder, out)
    return certificate


def export_from_checkpoint(
    run_dir: str | Path,
    recipe: Recipe,
    words: Words,
    out: str | Path,
    *,
    step: int | None = None,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> Certificate:
    """Export the checkpoint of `step` (None: the newest good one) of a run; `merge` folds an adapter into its base.
    `dtype` stores a whole model in another than the run's own.

    `recipe` is the run's own. One copy of the model is held, in the dtypes of the training. Merging is done in fp32,
    matrix by matrix, and stored in the run's compute dtype. Raises CheckpointError when the checkpoint is bad or
    absent, ConfigError when there is nothing to merge, CertificateError when the folder is not the model.
    """
    folder = find(run_dir, step)
    if merge:
        refuse_to_merge(recipe.tuning, run_dir)
    compute = compute_dtype(Path(run_dir), recipe)
    anew = partial(rebuild, recipe, words.tokenizer, compute=compute, merging=merge)
    model = anew().eval()
    fill(model, folder)
    lm = causal_lm(model)
    ids = probe_ids(lm.config.get_text_config().vocab_size)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    rounded = compute if dtype is None else dtype
    probe = Probe(ids, logits, None, probe_limit(rounded, "cpu", merged=merge))
    code = recipe.model.trust_remote_code
    if merge:
        package = Package(lm.config, lm.generation_config, words, remote_code=code)
        weights = merged_weights(model, rounded)
    elif is_adapter(model) and dtype is not None:
        raise ConfigError("--dtype is for a whole model: an adapter is small, and stays as it was trained; add --merge")
    else:
        base = base_of(recipe, words.tokenizer, compute, lm.num_parameters()) if is_adapter(model) else None
        package, weights = package_of(model, words, base, code), plain_weights(model.state_dict(), dtype)
    certificate = export_model(package, weights, out, probe, file_bytes=file_bytes)
    assert certificate is not None
    return certificate


def model_tensors(state: Mapping[str, T], hf_config: PretrainedConfig) -> dict[str, T]:
    """`state` without the names of tied weights: transformers ties them again when it loads."""
    tied = getattr(_model_class(hf_config), "_tied_weights_keys", None) or ()
    is_tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
    return {name: tensor for name, tensor in state.items() if not (is_tied and name in tied)}


def adapter_tensors(state: Mapping[str, T], adapter: str = ADAPTER) -> dict[str, T]:
    """The adapter's tensors as PEFT names them: no adapter name, `modules_to_save` in their modules' places."""
    kept = {}
    for name, tensor in state.items():
        if f".modules_to_save.{adapter}." in name:
            kept[name.replace(f".modules_to_save.{adapter}.", ".")] = tensor
        elif name == f"prompt_encoder.{adapter}.embedding.weight":
            kept["prompt_embeddings"] = tensor
        elif name.endswith(f".lora_magnitude_vector.{adapter}.weight"):
            kept[name.removesuffix(f".{adapter}.weight")] = tensor
        elif ".lora_" in name and f".{adapter}" in name:
            kept[name.replace(f".{adapter}", "", 1)] = tensor
    return kept


def rehearse_words(config: PretrainedConfig, words: Words) -> None:
    """Raise ConfigError when stock Transformers would read other words than the training's from an export: asked before
    the first step, since no training could mend it.

    Transformers 5.23 takes the tokenizer class of some architectures (qwen2 and others) from their name, whatever
    tokenizer_config.json says, and rebuilds the tokenizer by that class's rules.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        _loadable_config(config, {}).save_pretrained(folder)
        _write_words(folder, words, None)
        if fault := words_fault(folder, words):
            raise ConfigError(
                f"model.tokenizer={words.tokenizer.name_or_path}: beside a config of {config.model_type}, stock "
                f"transformers reads it wrongly ({fault}): use the model's own tokenizer, or another architecture"
            )


def _describe(folder: Path, package: Package, written: Mapping[str, Written]) -> None:
    """Everything beside the weights."""
    if package.peft_config is not None:
        stored = copy.deepcopy(package.peft_config)
        stored.inference_mode = True
        stored.save_pretrained(folder)
    else:
        _loadable_config(package.config, written).save_pretrained(folder)
    _write_words(folder, package.words, package.generation_config)


def _proven(folder: Path, out: Path, package: Package, written: Mapping[str, Written], probe: Probe) -> Certificate:
    """The certificate, written into the folder. Raises CertificateError that says what happens to the older export."""
    try:
        if package.peft_config is not None:
            assert package.base is not None, "an adapter is proven on its base"
            certificate = certify_adapter(folder, written, package.words, probe, package.base)
        else:
            certificate = certify_model(folder, written, package.words, probe, package.remote_code)
    except CertificateError as error:
        older = "the older export stays as it is" if out.exists() else "nothing was published"
        raise CertificateError(f"{out}: the export is not the trained model: {error}; {older}") from error
    write_record(folder, certificate)
    return certificate


def _write_words(folder: Path, words: Words, generation_config: GenerationConfig | None) -> None:
    """Tokenizer with the training's chat template, and how to generate with it."""
    tokenizer, stop_token_ids = words.tokenizer, words.stop_token_ids
    speaker = copy.deepcopy(tokenizer)
    speaker.chat_template = words.template_text
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


def _loadable_config(hf_config: PretrainedConfig, written: Mapping[str, Written]) -> PretrainedConfig:
    """The config as a reader wants it: cache on, class named, dtype of what is stored."""
    config = copy.deepcopy(hf_config)
    config.use_cache = True
    config.architectures = config.architectures or [_model_class(config).__name__]
    config.dtype = next((getattr(torch, w.dtype) for w in written.values() if "float" in w.dtype), torch.float32)
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


@contextmanager
def _cleaned_up(folder: Path) -> Iterator[None]:
    """Whatever happens, `folder` is gone afterwards (published folders have another name by then)."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
