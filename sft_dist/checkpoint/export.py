"""The final artefact: a folder that stock Transformers (or PEFT, for an adapter) loads without this project.

Weights go out tensor by tensor (`weights`), with the tokenizer that carries the chat template of the training and the
generation config that carries its stop tokens. Everything is written into a fresh folder beside the target, proven by
re-opening it (`export_certificate`), made durable, and renamed: a half-written or a wrong export never has the name.
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sft_dist.checkpoint.catalog import find
from sft_dist.checkpoint.disk import check_space, fsync_path, rename_fresh, storage_errors
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
from sft_dist.checkpoint.manifest import read_manifest
from sft_dist.checkpoint.ranks import Ranks
from sft_dist.checkpoint.shards import read_shards
from sft_dist.checkpoint.weights import FILE_BYTES, Weight, Written, plain_weights, write_weights
from sft_dist.config.schema import Recipe, TuningSection
from sft_dist.errors import CertificateError, CheckpointError, ConfigError
from sft_dist.models.adapters import apply_tuning, apply_tuning_plain, is_adapter
from sft_dist.models.base import load_base
from sft_dist.models.load import DTYPES
from sft_dist.models.packed import causal_lm
from sft_dist.models.vocabulary import num_added

WEIGHTS_PREFIX = "model."
ADAPTER = "default"
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

    All ranks call with the same weights; rank 0 writes, and returns the certificate. An existing `out` is replaced once
    the new one is proven. Raises CertificateError (the older export stays) or StorageError, on all ranks.
    """
    ranks = ranks or Ranks()
    if package.peft_config is not None:
        stem, chosen = "adapter_model", adapter_tensors(weights)
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
        _refuse_to_merge(recipe.tuning, run_dir)
    compute = _compute_dtype(Path(run_dir), recipe)
    rebuild = partial(_rebuild, recipe, words.tokenizer, compute=compute, merging=merge)
    model = rebuild().eval()
    _fill(model, folder)
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


def _refuse_to_merge(tuning: TuningSection, run_dir: str | Path) -> None:
    """Raise ConfigError where nothing was added that could be folded into the base."""
    if not tuning.adds_adapter:
        raise ConfigError(
            f"--merge: {run_dir} tuned the model itself (tuning.method={tuning.method}), there is no adapter to merge"
        )
    if not tuning.is_low_rank:
        raise ConfigError(
            f"--merge: {run_dir} learned virtual tokens (tuning.method={tuning.method}), which stand before the input "
            f"and not in the weights; export without --merge"
        )


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


def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Weight]:
    """The base's weights with the adapter folded in, in `dtype`: each matrix is merged in fp32 when it is read."""
    lm = causal_lm(model)
    layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, BaseTunerLayer)}
    weights = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        owner, _, part = name.rpartition(".base_layer.")
        stored = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        if ".lora_" in name or ".original_module." in name:
            continue
        read: Callable[[], Tensor] = tensor.detach
        if owner in layers and part == "weight":
            read = partial(_merged, layers[owner])
        weights[stored] = Weight(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype, read)
    return weights


def _merged(layer: Any) -> Tensor:
    """The matrix of one adapted layer with its adapter added in fp32; the layer stays as it is."""
    parameter = layer.get_base_layer().weight
    kept = parameter.data
    parameter.data = kept.to(torch.float32, copy=True)
    try:
        layer.merge()
        return parameter.data
    finally:
        parameter.data = kept
        layer.merged_adapters.clear()


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


def _compute_dtype(run_dir: Path, recipe: Recipe) -> torch.dtype:
    """The dtype the run computed in: what `auto` meant is in its fingerprint."""
    record = run_dir / "fingerprint.json"
    chosen = json.loads(record.read_text())["choices"]["compute"] if record.is_file() else recipe.precision.compute
    return DTYPES.get(chosen, torch.float32)


def _rebuild(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, compute: torch.dtype, merging: bool) -> nn.Module:
    """The run's model as it was before its first step; for merging, a 4-bit base as plain matrices of the values that
    its codes stand for: those the adapter was trained on."""
    master, tuning = DTYPES[recipe.precision.master], recipe.tuning
    dtype = master if tuning.method == "full" else compute
    model = _base(recipe, tokenizer, dtype)
    tuned = (apply_tuning_plain if merging else apply_tuning)(model, tuning, recipe.run.seed, compute)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master)
    return tuned


def base_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, compute: torch.dtype, num_parameters: int) -> Base:
    """What an adapter of this run, with so many parameters under it, was trained on: to be loaded anew."""
    four_bits = recipe.tuning.method == "qlora"
    dtype = str(compute).removeprefix("torch.") if four_bits else None
    return Base(num_parameters * compute.itemsize, partial(_base, recipe, tokenizer, compute), dtype)


def _base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    return load_base(
        recipe.model,
        dtype=dtype,
        seed=recipe.run.seed,
        vocab_size=len(tokenizer),
        num_added=num_added(tokenizer),
        four_bits=recipe.tuning.method == "qlora",
    )


def _fill(model: nn.Module, folder: Path) -> None:
    """Read the checkpoint's weights into the parameters of the same names, in place."""
    wanted = {name: entry for name, entry in read_manifest(folder).tensors.items() if name.startswith(WEIGHTS_PREFIX)}
    parameters = {f"{WEIGHTS_PREFIX}{name}": parameter.data for name, parameter in model.named_parameters()}
    for name, entry in wanted.items():
        if name not in parameters or tuple(parameters[name].shape) != entry.shape:
            raise CheckpointError(f"{folder}: {name} does not fit the model that the run's config.yaml describes")
    read_shards(folder, {name: parameters[name] for name in wanted})


@contextmanager
def _cleaned_up(folder: Path) -> Iterator[None]:
    """Whatever happens, `folder` is gone afterwards (published folders have another name by then)."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
