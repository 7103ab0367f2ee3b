"""Names of other tools are answered with the line to paste, and that line is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sft_dist.config import foreign, keys
from sft_dist.config.export import settings
from sft_dist.config.loader import load_recipe
from sft_dist.errors import ConfigError

LEAST = ["model.path=gpt2", "data.sources.0.path=x"]


def answer(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe([], [*LEAST, *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("per_device_train_batch_size=4", "batch.tokens_per_micro_batch=8192"),
        ("micro_batch_size=2", "batch.tokens_per_micro_batch=4096"),
        ("gradient_accumulation_steps=8", "batch.tokens_per_step=16384"),
        ("learning_rate=2e-4", "optim.lr=2e-4"),
        ("num_train_epochs=3.0", "optim.epochs=3"),
        ("num_train_epochs=2.5", "optim.epochs=3"),
        ("max_length=1024", "data.seq_len=1024"),
        ("max_seq_length=1024", "data.seq_len=1024"),
        ("sequence_len=1024", "data.seq_len=1024"),
        ("cutoff_len=1024", "data.seq_len=1024"),
        ("lora_r=8", "tuning.rank=8"),
        ("lora_alpha=16", "tuning.alpha=16"),
        ("lora_target_modules=[q_proj, v_proj]", "'tuning.targets=[q_proj, v_proj]'"),
        ("base_model=Qwen/Qwen2.5-0.5B", "model.path=Qwen/Qwen2.5-0.5B"),
        ("model_name_or_path=gpt2", "model.path=gpt2"),
        ("model=gpt2-xl", "model.path=gpt2-xl"),
        ("train_on_inputs=true", "data.loss_on=all"),
        ("train_on_inputs=false", "data.prompt_loss_weight=0.0"),
        ("gradient_checkpointing=true", "memory.activation_checkpointing=full"),
        ("gradient_checkpointing=false", "memory.activation_checkpointing=none"),
        ("output_dir=out/a", "run.dir=out/a"),
        ("sample_packing=true", "data.packing=best_fit"),
        ("packing=false", "data.packing=none"),
        ("bf16=true", "precision.compute=bfloat16"),
        ("fp16=true", "precision.compute=bfloat16"),
        ("adapter=lora", "tuning.method=lora"),
        ("optim=adamw_torch", "optim.name=adamw"),
        ("lr_scheduler_type=constant_with_warmup", "optim.schedule=constant"),
        ("adam_beta2=0.95", "'optim.betas=[0.9, 0.95]'"),
        ("attn_implementation=flash_attention_2", "model.attention=flash"),
        ("datasets=[{path: a.json, type: alpaca}, {path: b.json}]", "'data.sources=[{path: a.json}, {path: b.json}]'"),
        ("report_to=none", "log.trackers=[]"),
        ("report_to=wandb", "log.trackers=[wandb]"),
        ("wandb_project=p", "log.project=p"),
        ("hub_model_id=o/n", "hub.push_to=o/n"),
        ("deepspeed=z3.json", "parallel.deepspeed_config=z3.json"),
        ("optim.learning_rate=1e-3", "optim.lr=1e-3"),
        ("model.torch_dtype=float16", "precision.compute=bfloat16"),
    ],
)
def test_a_foreign_name_is_answered_with_the_line_to_paste(setting: str, line: str) -> None:
    text = answer(setting)
    assert f"write {line}" in text, text


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["max_length=512", "per_device_train_batch_size=4"], "batch.tokens_per_micro_batch=2048"),
        (["data.seq_len=512", "micro_batch_size=4", "gradient_accumulation_steps=8"], "batch.tokens_per_step=16384"),
        (["max_steps=200", "warmup_steps=10"], "optim.warmup_fraction=0.05"),
        (["optim.max_steps=1000", "warmup_steps=30"], "optim.warmup_fraction=0.03"),
        (["adam_beta1=0.8", "adam_beta2=0.95"], "'optim.betas=[0.8, 0.95]'"),
    ],
)
def test_values_are_computed_from_their_neighbours(settings: list[str], line: str) -> None:
    assert f"write {line}" in answer(*settings)


@pytest.mark.parametrize(
    "setting", ["dataloader_num_workers=4", "max_steps=-1", "do_train=true", "push_to_hub=false", "push_to_hub=true"]
)
def test_what_has_no_counterpart_is_to_be_left_out_with_the_reason(setting: str) -> None:
    assert re.search(r"is the name of another tool: leave it out \(.+\)", answer(setting))


def test_a_whole_foreign_file_is_answered_with_a_recipe_that_loads(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(
        "base_model: Qwen/Qwen2.5-0.5B\n"
        "datasets:\n  - path: data/x.json\n    type: alpaca\n"
        "adapter: lora\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\n"
        "sequence_len: 1024\nsample_packing: true\n"
        "training_args:\n  learning_rate: 2e-4\n  num_train_epochs: 2\n"
        "micro_batch_size: 2\ngradient_accumulation_steps: 4\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe([theirs])
    text = str(caught.value)
    assert f"{theirs}:1: base_model is the name of another tool: write model: {{path: Qwen/Qwen2.5-0.5B}}" in text
    assert f"{theirs}:11: training_args.learning_rate is the name of another tool: write optim: {{lr: 2e-4}}" in text
    ours.write_text(text.partition("in one piece:\n")[2].replace("        ", ""))
    got = settings(load_recipe([ours]))
    assert (got["model.path"], got["tuning.method"], got["tuning.rank"], got["optim.lr"]) == (
        "Qwen/Qwen2.5-0.5B",
        "lora",
        8,
        2e-4,
    )
    assert (got["batch.tokens_per_micro_batch"], got["batch.tokens_per_step"], got["data.sources.0.path"]) == (
        2048,
        8192,
        "data/x.json",
    )


@pytest.mark.parametrize("value", ["1", "0.5", "true", "false", "auto", "some/path", "[a, b]", ""])
@pytest.mark.parametrize("name", sorted(foreign.NAMES))
def test_every_translation_names_keys_that_exist(name: str, value: str) -> None:
    advice = foreign.translate(name, value, lambda names: None)
    assert advice is not None and (advice.settings or advice.remark)
    assert all(keys.find(key) for key, _ in advice.settings), advice


def test_no_foreign_name_hides_a_key_of_its_own_section() -> None:
    assert not [key for key in foreign.NAMES if key in keys.children("")]
