"""PackedCausalLM: a Hugging Face model and our loss head in one module, `batch -> loss sum`.

The Hugging Face model is used unchanged: its decoder gives hidden states, its output embedding is read as a matrix,
and the head runs over supervised positions only. The wrapper is what engines shard or replicate, so head and body
share one forward call. It contains no process group.

T tokens of the micro-batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft_dist.errors import ConfigError
from sft_dist.models.adapted import is_adapted
from sft_dist.models.attention import INTERFACE_NAMES, Segments
from sft_dist.models.entry import enter
from sft_dist.models.virtual_tokens import kind_of
from sft_dist.types import PackedBatch
from sft_kernels import KernelUnavailableError, choose_head

Head = Callable[..., Tensor]


class PackedCausalLM(nn.Module):
    """`forward(batch)` returns the fp32 sum of weight x cross-entropy over the batch's supervised positions."""

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        *,
        autocast_dtype: torch.dtype | None = None,
        neftune_alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model  # a PreTrainedModel, or a PeftModel around one
        self._head = head
        self._autocast_dtype = autocast_dtype
        self._noise_alpha = neftune_alpha or 0.0
        self._logit_scale, self._logit_softcap = logit_transform(causal_lm(model).config)

    def forward(self, batch: PackedBatch) -> Tensor:
        """fp32 scalar; connected to every trained tensor of body and head even when the batch supervises nothing."""
        with self._autocast(batch.input_ids.device.type):
            hidden = self.hidden_states(batch)
            projection = output_projection(causal_lm(self.model))
            return self._head(
                hidden.flatten(0, 1),
                projection.weight,
                batch.labels.flatten(),
                batch.loss_weights.flatten(),
                num_loss_tokens=batch.num_loss_tokens,
                bias=projection.bias,
                logit_scale=self._logit_scale,
                softcap=self._logit_softcap,
            )

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The decoder's last hidden states of the batch's tokens: [1, T, D] packed, [B, S, D] padded."""
        lm = causal_lm(self.model)
        with self._autocast(batch.input_ids.device.type):
            entry = enter(self.model, lm, batch, self._noise_alpha if self.training else 0.0)
            arguments = attention_arguments(entry.batch, lm.config._attn_implementation)
            output = lm.base_model(use_cache=False, **entry.inputs, **arguments, **entry.extra)
            return entry.narrow(output.last_hidden_state)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Hugging Face `generate`, reached through the wrapper so that engines can gather sharded weights first."""
        speaker = self.model if kind_of(self.model) else causal_lm(self.model)  # PEFT puts virtual tokens in front
        return speaker.generate(*args, **kwargs)  # type: ignore[operator]

    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, S, V] of plain token ids [B, S], as a user's forward call gives them; reached as `generate` is."""
        with self._autocast(input_ids.device.type):
            return self.model(input_ids=input_ids, use_cache=False).logits

    def _autocast(self, device_type: str) -> torch.autocast:
        enabled = self._autocast_dtype is not None
        return torch.autocast(device_type, dtype=self._autocast_dtype if enabled else torch.bfloat16, enabled=enabled)


def attention_arguments(batch: PackedBatch, implementation: str) -> dict[str, Any]:
    """What the attention layers need to keep documents apart: edges when packed, a mask when padded."""
    if batch.cu_seqlens is None:
        return {"attention_mask": batch.attention_mask}
    return {
        "attention_mask": None,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "segments": Segments.of(batch.cu_seqlens) if implementation.startswith(INTERFACE_NAMES["sdpa"]) else None,
    }


def pick_head(requested: str, device: torch.device) -> tuple[str, Head, str]:
    """(name, function, reason) of the loss head for `kernels.head`. Raises ConfigError when it cannot run here."""
    try:
        return choose_head(requested, device)
    except KernelUnavailableError as error:
        raise ConfigError(f"kernels.{error}") from error


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The PreTrainedModel inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def carries_virtual_tokens(model: nn.Module) -> bool:
    """Whether `model` (or the one inside a PackedCausalLM) was tuned by prompt or prefix."""
    return kind_of(model.model if isinstance(model, PackedCausalLM) else model) is not None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks: the longest ModuleList directly in the decoder."""
    lists = [list(module) for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """The module that turns hidden states into logits; PEFT's `modules_to_save` copy when there is one.

    Raises ConfigError when it is not a plain matrix (an adapter on the head): the supervised-only head reads a matrix.
    """
    projection = model.get_output_embeddings()
    if hasattr(projection, "modules_to_save"):
        projection = projection.modules_to_save[projection.active_adapters[0]]
    if not isinstance(projection, nn.Linear):
        raise ConfigError(
            f"model: output head is a {type(projection).__name__}, not a linear layer: "
            f"leave lm_head out of tuning.targets"
        )
    return projection


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft cap) that the architecture applies to its logits, by the names transformers uses.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps with `final_logit_softcapping`.
    """
    text = config.get_text_config()
    scale = 1.0
    if text.model_type.startswith("granite"):
        scale = 1.0 / float(getattr(text, "logits_scaling", 1.0))
    elif text.model_type.startswith("cohere"):
        scale = float(getattr(text, "logit_scale", 1.0))
    return scale, getattr(text, "final_logit_softcapping", None)
