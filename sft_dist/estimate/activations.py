"""Bytes that one micro-batch keeps on a rank for its backward pass: in the layers, and in the loss head.

What autograd saves in a layer of transformers (the tests count it too); Korthikanti et al. (2022) do so for Megatron's.
"""

from __future__ import annotations

from sft_dist.estimate.architecture import Architecture
from sft_dist.estimate.layout import FP32, Layout
from sft_dist.estimate.tuning import Tuned

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 1280 * 2**20}  # logits of one chunk: sft_kernels.one_pass.CHUNK_BYTES


def activation_bytes(architecture: Architecture, tuned: Tuned, layout: Layout) -> int:
    """What autograd keeps of all layers at the end of the forward pass."""
    tokens, stream = layout.micro_tokens, _stream_bytes(tuned, layout)
    edge = tokens * architecture.hidden_size * (FP32 + stream)  # around the last norm
    if layout.checkpointing:
        return edge + architecture.num_layers * tokens * architecture.hidden_size * stream
    return edge + architecture.num_layers * layer_activation_bytes(architecture, tuned, layout)


def layer_activation_bytes(architecture: Architecture, tuned: Tuned, layout: Layout) -> int:
    """What autograd keeps of one layer: inputs of norms in fp32, inputs of matrices, queries to values, the MLP."""
    a, c, stream = architecture, layout.compute, _stream_bytes(tuned, layout)
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    norm = FP32 * a.hidden_size + (stream * a.hidden_size if tuned.trains_all else 0)
    norms = a.num_norms * norm
    if a.qk_norm:
        norms += (queries + keys) * (FP32 + (c if tuned.trains_all else 0))
    casts_each = layout.autocasts and (stream != c or not tuned.trains_all)  # one copy per matrix instead of one in all
    inputs = (a.num_inward if casts_each else 2) * c * a.hidden_size
    attention = c * (2 * queries + 2 * keys)
    if layout.device == "cpu":
        attention += c * queries  # documents are gathered by length and put back
    mlp = 4 * c * a.intermediate_size
    return layout.micro_tokens * (norms + inputs + attention + mlp)


def head_bytes(architecture: Architecture, tuned: Tuned, layout: Layout) -> dict[str, int]:
    """One chunk of logits, supervised rows with their gradients, a cast matrix; and the matrix's gradient."""
    a, c = architecture, layout.compute
    rows = layout.micro_loss_tokens * a.hidden_size * c
    logits = min(layout.micro_loss_tokens * a.vocab_size * c, CHUNK_BYTES[layout.device])
    cast = a.vocab_size * a.hidden_size * c if layout.autocasts and tuned.trains_head else 0
    gradient = a.vocab_size * a.hidden_size * FP32 if tuned.trains_head else 0
    return {"loss head": 2 * rows + logits + cast, "gradient of the head": gradient}


def _stream_bytes(tuned: Tuned, layout: Layout) -> int:
    """Of the residual stream: fp32 where autocast meets fp32 embeddings."""
    return layout.master if layout.autocasts and tuned.trains_all else layout.compute
