"""Tiny configurations of real architectures: two layers, few weights, every feature that packing can break."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Model type -> what differs from SMALL.
PACKABLE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": None},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "olmo2": {},
    "gemma": {"num_key_value_heads": 1},
    "phi": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "seed_oss": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
}
# These leak or cannot be told about segments: the certificate must refuse them.
NOT_PACKABLE: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False, "head_dim": None},
    "stablelm": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The tiny configuration of `model_type`, packable or not."""
    values = SMALL | (PACKABLE | NOT_PACKABLE)[model_type]
    return AutoConfig.for_model(model_type, **{name: value for name, value in values.items() if value is not None})
