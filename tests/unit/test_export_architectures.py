"""Every architecture that the packing certificate knows is exported and read back by stock transformers, bit for bit.

Among them experts that transformers fuses while loading, tied heads, state-space layers, and models without packing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import NOT_PACKABLE, PACKABLE, tiny_config
from preparing import byte_tokenizer

from sft_dist.checkpoint.export import export_model, package_of
from sft_dist.checkpoint.export_certificate import Probe, Words, probe_ids
from sft_dist.checkpoint.weights import plain_weights
from sft_dist.models.load import build_random


@pytest.mark.parametrize("model_type", [*PACKABLE, *NOT_PACKABLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_architecture_is_exported_bit_for_bit(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    model = build_random(tiny_config(model_type), dtype=dtype, seed=0).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():  # norms start as ones, and would hide an exchange
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = probe_ids(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        probe = Probe(ids, model(input_ids=ids, use_cache=False).logits.float(), None, limit=0.0)
    package = package_of(model, Words(byte_tokenizer(), "{{ messages }}"))
    certificate = export_model(package, plain_weights(model.state_dict()), tmp_path / "out", probe, file_bytes=20_000)
    assert certificate is not None and certificate.difference == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
