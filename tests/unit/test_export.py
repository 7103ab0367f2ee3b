"""Exports load in stock Transformers and PEFT, give the same logits bit for bit, and generate with our stop tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sft_dist.checkpoint import export as export_module
from sft_dist.checkpoint import export_certificate as certificate_module
from sft_dist.checkpoint import merging as merging_module
from sft_dist.checkpoint import weights as weights_module
from sft_dist.checkpoint.export import (
    LIMITS,
    adapter_tensors,
    export_from_checkpoint,
    export_model,
    model_tensors,
    package_of,
    rehearse_words,
)
from sft_dist.checkpoint.export_certificate import RECORD, Base, Probe, Words, probe_ids
from sft_dist.checkpoint.manager import CheckpointManager
from sft_dist.checkpoint.merging import merged_weights
from sft_dist.checkpoint.weights import FILE_BYTES, Weight, plain_weights, write_weights
from sft_dist.config.schema import Recipe
from sft_dist.errors import CertificateError, CheckpointError, ConfigError, StorageError
from sft_dist.models.adapters import apply_tuning
from sft_dist.models.load import load_model

WORDS = ["<pad>", "<s>", "</s>", "<|end|>", "one", "two", "three"]
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {key: value for key, value in ARCHITECTURE.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**values, **changes)).eval()
    model.config.use_cache = False
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 4, 5, 6, 4]]), use_cache=False).logits


def probe_of(model: nn.Module, limit: float = 0.0) -> Probe:
    ids = probe_ids(len(WORDS))
    with torch.no_grad():
        return Probe(ids, model.eval()(input_ids=ids, use_cache=False).logits.float(), None, limit)


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    *,
    stops: Sequence[int] = (),
    change: Callable[[dict[str, Weight]], None] = lambda weights: None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Export and certify, in bf16 too bit for bit: both sides run on the same CPU. `change` spoils the weights."""
    package = package_of(model, Words(tokenizer, TEMPLATE, stops), Base(0, tiny))
    weights = plain_weights(model.state_dict())
    probe = probe_of(model)
    change(weights)
    certificate = export_model(package, weights, out, probe, file_bytes=file_bytes)
    assert certificate is not None and certificate.difference == 0
    return out


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_bytes", [FILE_BYTES, 1500], ids=["one file", "shards"])
def test_a_full_export_loads_in_transformers_with_the_same_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool, dtype: torch.dtype, file_bytes: int
) -> None:
    model = tiny(tie_word_embeddings=tied).to(dtype)
    out = export(model, tokenizer, tmp_path / "export", stops=[3], file_bytes=file_bytes)
    loaded, problems = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values()), problems
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.use_cache is True
    assert loaded.generation_config.eos_token_id == 3
    assert loaded.generation_config.pad_token_id == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is tied
    assert (len(list(out.glob("*.safetensors"))) > 1) is (file_bytes == 1500)
    assert json.loads((out / RECORD).read_text())["difference"] == 0
    reloaded = AutoTokenizer.from_pretrained(out)
    assert reloaded.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False) == "one<|end|>"
    assert tokenizer.chat_template is None and model.config.use_cache is False  # the caller's objects stay as they were


def test_tied_weights_are_dropped_also_when_they_arrive_as_copies() -> None:
    model = tiny(tie_word_embeddings=True)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for state in (model.state_dict(), copies):
        assert "lm_head.weight" not in model_tensors(state, model.config)
    untied = tiny(tie_word_embeddings=False)
    assert "lm_head.weight" in model_tensors(untied.state_dict(), untied.config)


def adapted(**changes: object) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **changes)  # type: ignore[arg-type]
    model = get_peft_model(tiny(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.1)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}],
    ids=["lora", "rslora", "modules_to_save"],
)
def test_an_adapter_export_loads_in_peft_with_the_same_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, changes: dict[str, object]
) -> None:
    model = adapted(**changes)
    out = export(model, tokenizer, tmp_path / "export", file_bytes=1500)
    assert [path.name for path in out.glob("*.safetensors")] == ["adapter_model.safetensors"]  # PEFT reads no index
    loaded = PeftModel.from_pretrained(tiny(), out)
    assert torch.equal(logits(loaded), logits(model))
    stored = adapter_tensors(model.state_dict())
    assert not any(".default" in name or "base_layer" in name or "original_module" in name for name in stored)


def test_an_older_export_is_replaced_and_nothing_else_is_left(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    out = export(tiny(), tokenizer, tmp_path / "export")
    (out / "old").write_text("")
    export(tiny(), tokenizer, out)
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failed_export_leaves_the_older_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(tiny(), tokenizer, tmp_path / "export")
    before = (out / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "_put", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(tiny(), tokenizer, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def recipe(tokenizer_dir: Path, **sections: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "r", "seed": 7},
            "model": {"init": "random", "config": ARCHITECTURE, "tokenizer": str(tokenizer_dir)},
            "precision": {"compute": "float32"},
            "data": {"sources": [{"path": "d"}]},
            **sections,
        }
    )


def trained(run: Recipe) -> nn.Module:
    """The run's model with every trained tensor moved."""
    base = load_model(run.model, dtype=torch.float32, seed=7, vocab_size=len(WORDS))
    model = apply_tuning(base, run.tuning, 7)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "tuning", [{}, {"freeze": ["*embed*"]}, {"method": "lora", "rank": 2}], ids=["full", "frozen", "lora"]
)
def test_a_checkpoint_exports_to_the_model_it_holds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tuning: dict[str, object]
) -> None:
    run = recipe(tmp_path, tuning=tuning)
    model = trained(run)
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    CheckpointManager(tmp_path / "run").save(4, state, {"step": 4})
    for merge in (False, True) if "method" in tuning else (False,):
        out = tmp_path / f"out-{merge}"
        certificate = export_from_checkpoint(
            tmp_path / "run", run, Words(tokenizer, TEMPLATE, [2, 3]), out, merge=merge
        )
        assert merge or certificate.difference == 0
        if "method" in tuning and not merge:
            base = load_model(run.model, dtype=torch.float32, seed=7, vocab_size=len(WORDS))
            assert torch.equal(logits(PeftModel.from_pretrained(base, out)), logits(model))
        else:
            loaded = AutoModelForCausalLM.from_pretrained(out)
            assert loaded.generation_config.eos_token_id == [2, 3]
            torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6 if merge else 0)


def test_what_cannot_be_exported_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = recipe(tmp_path)
    model = trained(run)
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    manager = CheckpointManager(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_from_checkpoint(tmp_path / "run", run, Words(tokenizer, TEMPLATE), tmp_path / "out")
    manager.save(4, state | {"model.stranger": torch.zeros(1)}, {})
    with pytest.raises(ConfigError, match="there is no adapter to merge"):
        export_from_checkpoint(tmp_path / "run", run, Words(tokenizer, TEMPLATE), tmp_path / "out", merge=True)
    with pytest.raises(CheckpointError, match=r"model\.stranger does not fit"):
        export_from_checkpoint(tmp_path / "run", run, Words(tokenizer, TEMPLATE), tmp_path / "out")


def swap_reads(weights: dict[str, Weight]) -> None:
    """The engine hands out two tensors under each other's name."""
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]


def narrow(weights: dict[str, Weight]) -> None:
    """One tensor is announced, and so stored, in a narrower dtype."""
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = replace(weights[name], dtype=torch.bfloat16)


def rename(weights: dict[str, Weight]) -> None:
    weights["model.layers.0.mlp.over_proj.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [(swap_reads, "logits are .* they must be equal"), (narrow, "logits are"), (rename, "transformers reports")],
    ids=["swapped", "narrowed", "renamed"],
)
def test_weights_that_are_not_the_models_are_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    change: Callable[[dict[str, Weight]], None],
    message: str,
) -> None:
    out = export(tiny(), tokenizer, tmp_path / "export")
    (out / "mark").write_text("older")
    with pytest.raises(CertificateError, match=rf"{message}.*; the older export stays as it is"):
        export(tiny(), tokenizer, out, change=change)
    assert (out / "mark").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


FIRST = "model.layers.0.self_attn.q_proj.weight"
SECOND = "model.layers.1.self_attn.q_proj.weight"


def swap_on_disk(folder: Path) -> None:
    """As a writer that lost its place: same names and shapes, exchanged values."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if FIRST in tensors and SECOND in tensors:
            tensors[FIRST], tensors[SECOND] = tensors[SECOND].clone(), tensors[FIRST].clone()
        save_file(tensors, path, metadata={"format": "pt"})


def widen_on_disk(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: t.double() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})


def flip_one_bit(folder: Path) -> None:
    path = next(iter(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_a_file(folder: Path) -> None:
    sorted(folder.glob("*-00002-of-*.safetensors"))[0].unlink()


def lose_a_name(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][FIRST]
    path.write_text(json.dumps(index))


def set_json(file: str, key: str, value: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return spoil


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("spoil", "file_bytes", "message"),
    [
        (swap_on_disk, FILE_BYTES, "q_proj.weight: its values are not the model's"),
        (widen_on_disk, FILE_BYTES, r"is float64\[.*\], the model holds float32"),
        (flip_one_bit, FILE_BYTES, "its values are not the model's"),
        (lose_a_file, 6000, "model-00002-of-.*safetensors.*is missing"),
        (lose_a_name, 6000, f"{FIRST}: is missing"),
        (set_json("generation_config.json", "eos_token_id", 2), FILE_BYTES, r"stops at \[2\], the training at \[3\]"),
        (
            set_json("config.json", "dtype", "bfloat16"),
            FILE_BYTES,
            "config.json says bfloat16, the tensors are float32",
        ),
        (set_json("config.json", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}), FILE_BYTES, "logits"),
        (other_template, FILE_BYTES, "chat template: differs"),
    ],
    ids=["swapped", "wrong dtype", "bit", "no file", "no name", "stop token", "config dtype", "rope", "template"],
)
def test_a_folder_spoiled_while_it_was_written_is_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    file_bytes: int,
    message: str,
) -> None:
    describe = export_module._describe
    monkeypatch.setattr(export_module, "_describe", lambda folder, *rest: (describe(folder, *rest), spoil(folder)))
    with pytest.raises(CertificateError, match=rf"{message}.*; nothing was published"):
        export(tiny(), tokenizer, tmp_path / "export", stops=[3], file_bytes=file_bytes)
    assert not list(tmp_path.iterdir())


def test_a_spoiled_adapter_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(weights: dict[str, Weight]) -> None:
        first, second = (f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_B.default.weight" for n in (0, 1))
        weights[first], weights[second] = weights[second], weights[first]

    with pytest.raises(CertificateError, match="logits are"):
        export(adapted(), tokenizer, tmp_path / "export", change=swap)
    monkeypatch.setattr(certificate_module, "_free_bytes", lambda: -1)
    model = adapted()
    package = package_of(model, Words(tokenizer, TEMPLATE), Base(1, tiny))
    certificate = export_model(package, plain_weights(model.state_dict()), tmp_path / "export", probe_of(model))
    assert certificate is not None and certificate.difference is None
    assert "peft was not asked: its base needs" in certificate.line()


def test_a_merge_has_a_limit_that_tells_rounding_from_a_wrong_matrix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(tmp_path, tuning={"method": "lora", "rank": 2})
    model = trained(run)
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    CheckpointManager(tmp_path / "run").save(4, state, {"step": 4})
    arguments = (tmp_path / "run", run, Words(tokenizer, TEMPLATE), tmp_path / "merged")
    certificate = export_from_checkpoint(*arguments, merge=True)
    assert certificate.difference is not None and certificate.difference <= LIMITS[torch.float32] / 10
    merge = merging_module._merged
    monkeypatch.setattr(merging_module, "_merged", lambda layer: layer.get_base_layer().weight.detach())
    with pytest.raises(CertificateError, match="at most 1e-04 is allowed; the older export stays"):
        export_from_checkpoint(*arguments, merge=True)
    monkeypatch.setattr(merging_module, "_merged", merge)
    assert export_from_checkpoint(*arguments, merge=True) == certificate


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.int64]), min_size=6,
                    max_size=6),
    file_bytes=st.integers(1, 600),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_tensors_are_written_as_the_library_reads_them(
    shapes: list[list[int]], dtypes: list[torch.dtype], file_bytes: int
) -> None:
    tensors = {f"t{n}": torch.randn(shape).to(dtypes[n]) for n, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_weights(folder, "model", plain_weights(tensors), file_bytes=file_bytes)
        assert weights_module.weights_fault(folder, "model", written) is None
        read = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert all(read[name].dtype == tensors[name].dtype for name in tensors)


def test_ranks_that_do_not_write_read_the_same_tensors_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the writer's disk is full in the middle: reading is collective, the others would wait for ever."""
    tensors = {f"t{n}": torch.full((4,), float(n)) for n in range(9)}

    def reads(writes: bool) -> list[str]:
        order: list[str] = []
        weights = {
            name: replace(weight, read=lambda name=name, read=weight.read: (order.append(name), read())[1])
            for name, weight in plain_weights(tensors).items()
        }
        with suppress(OSError):
            write_weights(tmp_path, "model", weights, file_bytes=48, writes=writes)
        return order

    expected = reads(writes=False)
    assert sorted(expected) == sorted(tensors) and not list(tmp_path.iterdir())
    put = weights_module._put

    def full_after_four(out: BinaryIO, file: str, name: str, *rest: Any) -> Any:
        if name == "t4":
            raise OSError(28, "No space left on device")
        return put(out, file, name, *rest)

    monkeypatch.setattr(weights_module, "_put", full_after_four)
    assert reads(writes=True) == expected


def test_a_tokenizer_that_stock_transformers_would_misread_is_refused_before_training(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Beside a config of qwen2 it is rebuilt by Qwen2's rules, and unknown words are encoded otherwise."""
    words = Words(tokenizer, TEMPLATE, [3])
    rehearse_words(AutoConfig.for_model("llama", vocab_size=len(WORDS)), words)
    with pytest.raises(ConfigError, match="beside a config of qwen2, stock transformers reads it wrongly"):
        rehearse_words(AutoConfig.for_model("qwen2", vocab_size=len(WORDS)), words)


def test_merging_leaves_the_model_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each matrix is merged when it is read, so reading twice must not add the adapter twice."""
    model = adapted().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = merged_weights(model, torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[name].read(), weights[name].read())
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    assert not torch.equal(weights[name].read().bfloat16(), tiny().bfloat16().state_dict()[name])


def test_a_full_model_is_stored_narrower_when_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = recipe(tmp_path)
    model = trained(run)
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    CheckpointManager(tmp_path / "run").save(4, state, {"step": 4})
    words, out = Words(tokenizer, TEMPLATE), tmp_path / "out"
    certificate = export_from_checkpoint(tmp_path / "run", run, words, out, dtype=torch.bfloat16)
    assert certificate.dtype == "bfloat16" and 0 < certificate.difference < LIMITS[torch.bfloat16] / 5
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(p, model.state_dict()[name].bfloat16()) for name, p in loaded.state_dict().items())
    adapter = recipe(tmp_path, tuning={"method": "lora", "rank": 2})
    lora = {f"model.{name}": p.detach() for name, p in trained(adapter).named_parameters() if p.requires_grad}
    CheckpointManager(tmp_path / "lora").save(4, lora, {"step": 4})
    with pytest.raises(ConfigError, match="an adapter is small, and stays as it was trained; add --merge"):
        export_from_checkpoint(tmp_path / "lora", adapter, words, out, dtype=torch.bfloat16)
