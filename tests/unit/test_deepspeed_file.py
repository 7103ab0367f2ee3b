"""Every key of a DeepSpeed file is taken over, agrees, is listed as harmless, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import train, write_recipe

from sft_dist.cli.main import main
from sft_dist.config.deepspeed_file import ADOPTED, FIXED, HARMLESS, adopt_file
from sft_dist.config.loader import adoptions, dump_recipe, load_recipe, load_resolved, origins
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

USUAL: dict[str, Any] = {  # the file that circulates with the Hugging Face Trainer, stage 3 with offloading
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def recipe(file: Path, **sections: Any) -> Recipe:
    base = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}], "seq_len": 512}}
    parallel = {"deepspeed_config": str(file)} | sections.pop("parallel", {})
    return Recipe.model_validate({**base, **sections, "parallel": parallel})


def adopted(tmp_path: Path, content: Any, **sections: Any) -> tuple[Recipe, list[str]]:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return adopt_file(recipe(file, **sections))


def test_the_usual_file_is_adopted_and_every_leaf_is_accounted_for(tmp_path: Path) -> None:
    found, notices = adopted(tmp_path, USUAL)
    assert (found.parallel.strategy, found.parallel.offload) == ("zero3", "params")
    assert found.optim.schedule == "constant" and found.optim.lr == "auto" and found.precision.compute == "auto"
    taken = [line for line in notices if "taken from" in line]
    assert [line.split("=")[0] for line in taken] == ["optim.schedule", "parallel.strategy", "parallel.offload"]
    (harmless,) = [line for line in notices if "no effect here" in line]
    for leaf in ("zero_optimization.overlap_comm", "steps_per_print", "fp16.loss_scale", "fp16.enabled"):
        assert leaf in harmless
    assert adopt_file(found)[0] == found  # what was taken agrees with itself


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ({"zero_optimization": {"stage": 0}}, "parallel.strategy", "ddp"),
        ({"zero_optimization": {"stage": 1}}, "parallel.strategy", "zero1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "parallel.offload", "optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, "parallel.offload", "none"),
        ({"bf16": {"enabled": True}}, "precision.compute", "bfloat16"),
        ({"bf16": {"enabled": False}}, "precision.compute", "float32"),
        ({"gradient_clipping": 0.3}, "optim.max_grad_norm", 0.3),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "memory.activation_offload", True),
        ({"optimizer": {"type": "Adam", "params": {"lr": 3e-5}}}, "optim.lr", 3e-5),
        ({"optimizer": {"params": {"betas": [0.8, 0.99]}}}, "optim.betas", (0.8, 0.99)),
        ({"optimizer": {"params": {"eps": 1e-6}}}, "optim.eps", 1e-6),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "optim.weight_decay", 0.1),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "optim.schedule", "linear"),
        ({"train_micro_batch_size_per_gpu": 4}, "batch.tokens_per_micro_batch", 2048),
        ({"train_batch_size": 64}, "batch.tokens_per_step", 32768),
    ],
    ids=json.dumps,
)
def test_a_value_is_taken_where_the_recipe_is_silent(tmp_path: Path, content: Any, key: str, value: Any) -> None:
    section, name = key.split(".")
    assert getattr(getattr(adopted(tmp_path, content)[0], section), name) == value


@pytest.mark.parametrize(
    ("content", "sections", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, {"parallel": {"strategy": "zero3"}},
         r"zero_optimization.stage=2 means parallel.strategy=zero2, but the recipe says parallel.strategy=zero3"),
        ({"gradient_clipping": 0.5}, {"optim": {"max_grad_norm": 1.0}}, "optim.max_grad_norm=0.5, but the recipe says"),
        ({"bf16": {"enabled": True}}, {"precision": {"compute": "float32"}}, "recipe says precision.compute=float32"),
        ({"train_batch_size": 64}, {"batch": {"tokens_per_step": 4096}}, "means batch.tokens_per_step=32768, but"),
        ({"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"params": {"warmup_max_lr": 1e-4}}}, {},
         "optimizer.params.lr=0.001 and .*warmup_max_lr=0.0001 differ"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, {},
         "with its settings taken over, .*parallel.offload=params needs parallel.strategy=zero3"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, {}, "train_batch_size=10 is no multiple"),
    ],
    ids=["stage", "clipping", "precision", "batch", "twice", "together", "sizes"],
)  # fmt: skip
def test_a_contradiction_is_refused_with_both_sides(
    tmp_path: Path, content: Any, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adopted(tmp_path, content, **sections)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled=true: fp16 is not available"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type="Lion": not available; see optim.name'),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'offload_param.device="nvme": not available'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: not available"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true: not available"),
        (
            {"zero_optimization": {"stag": 3}},
            r"zero_optimization.stag: unknown here.*did you mean zero_optimization.stage",
        ),
        ({"gradient_clipping": 0}, "gradient_clipping=0: not available"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: .* say train_batch_size"),
        ({"train_batch_size": 0}, "train_batch_size=0: must be a whole number"),
        ({"scheduler": {"params": {"warmup_num_steps": 10}}}, "warmup_num_steps=10: say optim.warmup_fraction"),
        ({"wandb": {"enabled": True}}, r"wandb.enabled=true: say log.trackers=\[wandb\]"),
        ({"made_up": {"x": []}}, "made_up.x: unknown here, and nothing is ignored"),
        ("[1]", "must hold a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopted(tmp_path, content)


def test_no_leaf_can_be_ignored() -> None:
    """The three tables do not overlap, and a leaf outside them is refused (above)."""
    assert not ADOPTED.keys() & FIXED.keys()
    assert not (ADOPTED.keys() | FIXED.keys()) & set(HARMLESS)


def test_the_deepspeed_tables_know_every_key_of_deepspeed() -> None:
    """Its own zero_optimization fields: each is in one of our tables, so no real file meets "unknown" by oversight."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {name.split(".")[1] for name in (*ADOPTED, *FIXED, *HARMLESS) if name.startswith("zero_optimization.")}
    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert fields - known == NOT_HAD


NOT_HAD = {  # refused as unknown: what they switch on is not in this engine
    "cpu_offload_param", "cpu_offload_use_pin_memory", "leaf_module", "save_muon_momentum_buffer_in_memory", "zenflow",
}  # fmt: skip


def test_a_file_goes_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(USUAL))
    path = write_recipe(tmp_path, parallel={"deepspeed_config": str(file)})
    assert load_recipe([path]).parallel.strategy == "zero3"
    assert any("parallel.strategy=zero3 taken from" in line for line in adoptions([path]))
    assert origins([path])["parallel.strategy"] == str(file)
    assert main(["config", "check", str(path)]) == 0
    assert "parallel.offload=params taken from" in capsys.readouterr().out
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump_recipe(load_recipe([path])))
    file.unlink()  # a run folder stands alone
    assert load_resolved(copy).parallel.strategy == "zero3"
    assert main(["config", "check", str(path)]) == 2
    assert f"parallel.deepspeed_config={file}: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_obeys_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(USUAL | {"gradient_clipping": 0.7}))
    path = write_recipe(
        tmp_path, parallel={"deepspeed_config": str(file)}, eval={"generate": 0}, optim={"max_steps": 2}
    )
    printed = train(path, "--nproc", "1")
    assert "engine       zero3, params offloaded" in printed
    assert "optim.max_grad_norm=0.7 taken from" in printed and "logits bit for bit" in printed
