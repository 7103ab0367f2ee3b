"""Names that other training tools use, and what to write here instead.

One table, `NAMES`: foreign key -> a function from its value to an `Advice`. The names are those of transformers, TRL,
PEFT, Axolotl, LLaMA-Factory, torchtune, DeepSpeed and Lightning. Nothing is translated silently: the recipe is refused
with the line to paste, value filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Lookup = Callable[[tuple[str, ...]], float | None]  # the first of these names that the recipe gives a number
Translate = Callable[[str, Lookup], "Advice"]

ROWS = ("per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu", "batch_size")
ACCUMULATION = ("gradient_accumulation_steps", "accumulate_grad_batches")
LENGTH = ("seq_len", "max_length", "max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "model_max_length")
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, slots=True)
class Advice:
    """What to write instead: settings as (dotted key, YAML text), and a remark. No settings: leave the line out."""

    settings: tuple[tuple[str, str], ...]
    remark: str = ""


def translate(name: str, value: str, lookup: Lookup) -> Advice | None:
    """The advice for a foreign key with this value (YAML text); None for names that are not in the table."""
    make = NAMES.get(name.lower().replace("-", "_"))
    return make(value, lookup) if make else None


def translate_section(section: str, value: str, lookup: Lookup) -> Advice | None:
    """The same for a word where this project has a section: `model: gpt2`, `optim: adamw_torch`."""
    make = SECTION_WORDS.get(section)
    return make(value, lookup) if make else None


# --- the few shapes of a translation -------------------------------------------------------------------------------


def _to(key: str, remark: str = "") -> Translate:
    """The same value under another name."""
    return lambda value, lookup: Advice(((key, value),), remark)


def _set(remark: str = "", **settings: str) -> Translate:
    """Fixed settings, `section__key="value"`."""
    fixed = tuple((key.replace("__", "."), value) for key, value in settings.items())
    return lambda value, lookup: Advice(fixed, remark)


def _words(key: str, words: Mapping[str, str | Translate]) -> Translate:
    """A word for a word; an unknown one is passed on, so that the key's own rule speaks next."""

    def make(value: str, lookup: Lookup) -> Advice:
        word = words.get(value.lower(), value)
        return Advice(((key, word),)) if isinstance(word, str) else word(value, lookup)

    return make


def _switch(on: Translate, off: Translate) -> Translate:
    """A truth value that chooses between two translations."""
    return lambda value, lookup: (off if value.lower() in ("false", "no", "off", "0", "none", "") else on)(
        value, lookup
    )


def _drop(remark: str) -> Translate:
    return lambda value, lookup: Advice((), remark)


# --- translations that compute -------------------------------------------------------------------------------------


def _rows_per_device(value: str, lookup: Lookup) -> Advice:
    seq_len = int(lookup(LENGTH) or DEFAULT_SEQ_LEN)
    if not value.isdecimal():
        return Advice((("batch.tokens_per_micro_batch", "auto"),))
    tokens = int(value) * seq_len
    return Advice((("batch.tokens_per_micro_batch", str(tokens)),), f"{value} rows x {seq_len} tokens")


def _accumulation(value: str, lookup: Lookup) -> Advice:
    seq_len, rows = int(lookup(LENGTH) or DEFAULT_SEQ_LEN), int(lookup(ROWS) or 1)
    if not value.isdecimal():
        return Advice((("batch.tokens_per_step", "auto"),))
    tokens = int(value) * rows * seq_len
    remark = f"{value} x {rows} rows x {seq_len} tokens for 1 process: multiply by their number"
    return Advice((("batch.tokens_per_step", str(tokens)),), remark)


def _global_rows(value: str, lookup: Lookup) -> Advice:
    return Advice((("batch.examples_per_step", value),), "examples of one optimizer step, over all processes")


def _epochs(value: str, lookup: Lookup) -> Advice:
    number = _number(value)
    if number is None or number.is_integer():
        return Advice((("optim.epochs", value if number is None else str(int(number))),))
    return Advice((("optim.epochs", str(math.ceil(number))),), "epochs are whole; optim.max_steps ends a run anywhere")


def _max_steps(value: str, lookup: Lookup) -> Advice:
    number = _number(value)
    return (
        Advice((), "epochs decide by default")
        if number is not None and number < 1
        else _to("optim.max_steps")(value, lookup)
    )


def _warmup_steps(value: str, lookup: Lookup) -> Advice:
    steps, total = _number(value), lookup(("max_steps", "max_train_steps"))
    if steps is None or not total or steps >= total:
        return Advice((("optim.warmup_fraction", "0.03"),), "warm-up steps divided by all steps")
    return Advice((("optim.warmup_fraction", f"{steps / total:.4g}"),), f"{value} of {int(total)} steps")


def _held_out(value: str, lookup: Lookup) -> Advice:
    number = _number(value)
    if number is not None and number >= 1:
        return Advice((("data.eval_fraction", "0.02"),), f"a share of the examples, not a count like {value}")
    return _to("data.eval_fraction")(value, lookup)


def _sources(value: str, lookup: Lookup) -> Advice:
    """A path, or Axolotl's list of mappings, of which only paths are carried over."""
    paths = re.findall(r"path: *([^,}\]]+)", value) or [value]
    return Advice((("data.sources", "[" + ", ".join(f"{{path: {path.strip()}}}" for path in paths) + "]"),))


def _betas(position: int, name: str) -> Translate:
    def make(value: str, lookup: Lookup) -> Advice:
        other = lookup((name,))
        pair = [value, f"{other or 0.999:g}"] if position == 0 else [f"{other or 0.9:g}", value]
        return Advice((("optim.betas", f"[{', '.join(pair)}]"),))

    return make


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- the table -----------------------------------------------------------------------------------------------------

_ADAMW: dict[str, str | Translate] = {
    **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("paged_adamw", "torch.optim.adamw"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"), "adamw8bit"),
}
_SCHEDULES: dict[str, str | Translate] = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_with_warmup": "cosine",
    "linear_with_warmup": "linear",
}
_DTYPES: dict[str, str | Translate] = {
    **dict.fromkeys(("bf16", "torch.bfloat16", "bf16-mixed", "bf16-true", "true"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "torch.float32", "no", "false", "32", "32-true"), "float32"),
    **dict.fromkeys(
        ("fp16", "float16", "torch.float16", "16-mixed"),
        _set("float16 needs loss scaling", precision__compute="bfloat16"),
    ),
}
_ATTENTION: dict[str, str | Translate] = {
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "flex_attention": "flex",
    "eager": "sdpa",
}
_SAVES_BY_STEPS = _drop("checkpoint.every_steps decides")
_EVALS_BY_STEPS = _drop("eval.every_steps decides")
_PLANNED = _drop("batches come from the pack plan, loaded ahead by one thread")
_FULL, _LORA = "full", "lora"

_TRAINED_PART = _switch(_set(data__loss_on="all"), _set(data__prompt_loss_weight="0.0"))
_METHOD = _words("tuning.method", {"lora": _LORA, "full": _FULL, "none": _FULL, "": _FULL, "freeze": _FULL})

NAMES: dict[str, Translate] = {
    # model
    "base_model": _to("model.path"),
    "model_name": _to("model.path"),
    "model_name_or_path": _to("model.path"),
    "model_path": _to("model.path"),
    "pretrained_model_name_or_path": _to("model.path"),
    "tokenizer_name": _to("model.tokenizer"),
    "tokenizer_name_or_path": _to("model.tokenizer"),
    "tokenizer_config": _to("model.tokenizer"),
    "model_revision": _to("model.revision"),
    "revision_of_model": _to("model.revision"),
    "attn_implementation": _words("model.attention", _ATTENTION),
    "flash_attention": _switch(_set(model__attention="flash"), _set(model__attention="sdpa")),
    "flash_attn": _words("model.attention", {"fa2": "flash", "true": "flash", "disabled": "sdpa", "false": "sdpa"}),
    "use_flash_attention_2": _switch(_set(model__attention="flash"), _set(model__attention="sdpa")),
    "sdp_attention": _switch(_set(model__attention="sdpa"), _set(model__attention="auto")),
    # precision
    "bf16": _switch(_set(precision__compute="bfloat16"), _set(precision__compute="float32")),
    "fp16": _switch(_set("float16 needs loss scaling", precision__compute="bfloat16"), _drop("float16 is never used")),
    "dtype": _words("precision.compute", _DTYPES),
    "torch_dtype": _words("precision.compute", _DTYPES),
    "mixed_precision": _words("precision.compute", _DTYPES),
    "torch_compile": _switch(_set(precision__compile="true"), _set(precision__compile="false")),
    "tf32": _drop("matrix products keep PyTorch's default"),
    # what is tuned
    "adapter": _METHOD,
    "finetuning_type": _METHOD,
    "peft_type": _METHOD,
    "use_peft": _switch(_set(tuning__method=_LORA), _set(tuning__method=_FULL)),
    "use_lora": _switch(_set(tuning__method=_LORA), _set(tuning__method=_FULL)),
    "use_rslora": _switch(_set(tuning__method="rslora"), _set(tuning__method=_LORA)),
    "use_dora": _switch(_set(tuning__method="dora"), _set(tuning__method=_LORA)),
    "load_in_4bit": _switch(_set(tuning__method="qlora"), _drop("tuning.method=qlora is what quantises")),
    "load_in_8bit": _switch(_set("in 4 bits", tuning__method="qlora"), _drop("tuning.method=qlora is what quantises")),
    "quantization_bit": _set("in 4 bits", tuning__method="qlora"),
    "num_virtual_tokens": _to("tuning.virtual_tokens"),
    "r": _to("tuning.rank"),
    "lora_r": _to("tuning.rank", "beside tuning.method: lora"),
    "lora_rank": _to("tuning.rank", "beside tuning.method: lora"),
    "lora_alpha": _to("tuning.alpha"),
    "lora_dropout": _to("tuning.dropout"),
    "lora_target": _words("tuning.targets", {"all": "all-linear"}),
    "lora_target_linear": _switch(_set(tuning__targets="all-linear"), _drop("name the layers in tuning.targets")),
    "lora_target_modules": _to("tuning.targets"),
    "target_modules": _to("tuning.targets"),
    "lora_modules_to_save": _to("tuning.modules_to_save"),
    "additional_target": _to("tuning.modules_to_save"),
    # data
    "datasets": _sources,
    "dataset": _sources,
    "dataset_name": _sources,
    "dataset_path": _sources,
    "data_path": _sources,
    "train_file": _sources,
    "train_data": _sources,
    "val_set_size": _held_out,
    "val_size": _held_out,
    "val_split_size": _held_out,
    "template": _to("data.chat_template"),
    "chat_template_path": _to("data.chat_template"),
    **{name: _to("data.seq_len") for name in LENGTH if name != "seq_len"},
    "max_tokens_per_row": _to("data.seq_len"),
    "packing": _switch(_set(data__packing="best_fit"), _set(data__packing="none")),
    "sample_packing": _switch(_set(data__packing="best_fit"), _set(data__packing="none")),
    "multipack": _switch(_set(data__packing="best_fit"), _set(data__packing="none")),
    "packing_strategy": _words("data.packing", {"bfd": "best_fit", "ffd": "best_fit", "wrapped": "best_fit"}),
    "padding_free": _switch(_set(data__packing="none"), _set(data__packing="padded")),
    "group_by_length": _switch(_set(data__packing="padded"), _drop("packing needs no sorting by length")),
    "eval_sample_packing": _drop("evaluation packs as data.packing says"),
    "pad_to_sequence_len": _drop("packs are filled by best fit"),
    "train_on_inputs": _TRAINED_PART,
    "train_on_prompt": _TRAINED_PART,
    "train_on_input": _TRAINED_PART,
    "mask_history": _switch(_set(data__loss_on="last_turn"), _set(data__loss_on="assistant")),
    "assistant_only_loss": _switch(_set(data__loss_on="assistant"), _set(data__loss_on="all")),
    "completion_only_loss": _switch(_set(data__loss_on="completion"), _set(data__loss_on="all")),
    "prompt_loss_token_weight": _to("data.prompt_loss_weight"),
    "dataset_text_field": lambda value, lookup: Advice(
        (), f"write columns: {{text: {value}}} in the entry of data.sources"
    ),
    "dataset_num_proc": _PLANNED,
    "dataloader_num_workers": _PLANNED,
    "preprocessing_num_workers": _PLANNED,
    "remove_unused_columns": _PLANNED,
    "dataset_prepared_path": _to("data.cache_dir"),
    "shuffle_merged_datasets": _drop("examples are always shuffled, by run.seed"),
    # batch
    **dict.fromkeys(ROWS, _rows_per_device),
    **dict.fromkeys(ACCUMULATION, _accumulation),
    "global_batch_size": _global_rows,
    "train_batch_size": _global_rows,
    "per_device_eval_batch_size": _drop("evaluation uses the micro-batch of training"),
    "eval_batch_size": _drop("evaluation uses the micro-batch of training"),
    "auto_find_batch_size": _set(batch__tokens_per_micro_batch="auto"),
    # optimizer
    "learning_rate": _to("optim.lr"),
    "optimizer": _words("optim.name", _ADAMW),
    "adam_beta1": _betas(0, "adam_beta2"),
    "adam_beta2": _betas(1, "adam_beta1"),
    "adam_epsilon": _to("optim.eps"),
    "lr_scheduler": _words("optim.schedule", _SCHEDULES),
    "lr_scheduler_type": _words("optim.schedule", _SCHEDULES),
    "warmup_ratio": _to("optim.warmup_fraction"),
    "warmup_steps": _warmup_steps,
    "num_warmup_steps": _warmup_steps,
    "max_norm": _to("optim.max_grad_norm"),
    "gradient_clipping": _to("optim.max_grad_norm"),
    "gradient_clip_val": _to("optim.max_grad_norm"),
    "num_train_epochs": _epochs,
    "num_epochs": _epochs,
    "max_epochs": _epochs,
    "max_steps": _max_steps,
    "max_train_steps": _max_steps,
    "neftune_noise_alpha": _to("optim.neftune_alpha"),
    "loraplus_lr_ratio": _to("optim.lora_plus_ratio"),
    # memory and processes
    "gradient_checkpointing": _switch(
        _set(memory__activation_checkpointing="full"), _set(memory__activation_checkpointing="none")
    ),
    "use_gradient_checkpointing": _switch(
        _set(memory__activation_checkpointing="full"), _set(memory__activation_checkpointing="none")
    ),
    "enable_activation_checkpointing": _switch(
        _set(memory__activation_checkpointing="full"), _set(memory__activation_checkpointing="none")
    ),
    "sequence_parallel_size": _to("parallel.sequence"),
    "sequence_parallel_degree": _to("parallel.sequence"),
    "context_parallel_size": _to("parallel.sequence"),
    "gradient_checkpointing_kwargs": _drop("memory.activation_checkpointing decides"),
    "use_liger_kernel": _switch(_set(kernels__head="auto"), _set(kernels__head="reference")),
    "fsdp": _set(parallel__strategy="fsdp2"),
    "fsdp_config": _set(parallel__strategy="fsdp2"),
    "deepspeed": _to("parallel.deepspeed_config"),
    "num_processes": _drop("it is an option of the command: --nproc N"),
    "nproc_per_node": _drop("it is an option of the command: --nproc N"),
    "ddp_find_unused_parameters": _drop("only trained parameters take part"),
    # run, checkpoints, evaluation, logging
    "output_dir": _to("run.dir"),
    "run_name": _to("run.name"),
    "data_seed": _to("run.seed"),
    "save_steps": _to("checkpoint.every_steps"),
    "save_strategy": _SAVES_BY_STEPS,
    "save_total_limit": _to("checkpoint.keep"),
    "save_only_model": _drop("checkpoints are always resumable; the final model is in RUN_DIR/export"),
    "save_safetensors": _drop("nothing else is written"),
    "resume_from_checkpoint": _switch(_set(checkpoint__resume="auto"), _set(checkpoint__resume="never")),
    "auto_resume_from_checkpoints": _switch(_set(checkpoint__resume="auto"), _set(checkpoint__resume="never")),
    "overwrite_output_dir": _switch(_set(checkpoint__resume="never"), _set(checkpoint__resume="auto")),
    "eval_steps": _to("eval.every_steps"),
    "eval_strategy": _EVALS_BY_STEPS,
    "evaluation_strategy": _EVALS_BY_STEPS,
    "early_stopping_patience": _to("eval.early_stopping"),
    "logging_steps": _to("log.every_steps"),
    "logging_dir": _drop("logs are in RUN_DIR/logs"),
    "report_to": _words(
        "log.trackers",
        {
            "none": "[]",
            "[]": "[]",
            "tensorboard": "[tensorboard]",
            "wandb": "[wandb]",
            "mlflow": "[mlflow]",
            "all": "[tensorboard]",
        },
    ),
    "wandb_project": _to("log.project"),
    "wandb_run_group": _to("log.group"),
    "mlflow_experiment_name": _to("log.project"),
    "push_to_hub": _switch(_drop("hub.push_to=owner/name uploads the export"), _drop("nothing is uploaded")),
    "hub_model_id": _to("hub.push_to"),
    "hub_private_repo": _to("hub.private"),
    "do_train": _drop("the verb says it: sft-dist train"),
    "do_eval": _EVALS_BY_STEPS,
    "stage": _drop("supervised fine-tuning is all there is"),
}

SECTION_WORDS: dict[str, Translate] = {
    "model": _to("model.path"),
    "data": _sources,
    "optim": _words("optim.name", _ADAMW),
    "precision": _words("precision.compute", _DTYPES),
    "tuning": _METHOD,
    "parallel": _words("parallel.strategy", {"fsdp": "fsdp2"}),
}
