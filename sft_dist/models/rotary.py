"""Rotary embeddings that change with the longest position of a forward pass, and what may share one with them.

`dynamic` stretches its frequencies to the longest position, `longrope` switches to other factors beyond the length of
the original pretraining. Transformers decides for the whole pass (`max(position_ids)`), so a long document would turn
the short ones beside it differently from how they are turned alone, and two slices of one row could disagree. The
certificate does not see it: its documents are short.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from sft_dist.errors import ConfigError


def turning_point(config: PretrainedConfig) -> tuple[str, int] | None:
    """(kind, the longest document whose frequencies do not depend on what is beside it); None where none do."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]  # one for each kind of layer
    found = []
    for rope in nested or [parameters]:
        kind = str(rope.get("rope_type", "default"))
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            found.append((int(original), kind))
        elif "dynamic" in kind:
            found.append((int(text.max_position_embeddings), kind))
    return (min(found)[1], min(found)[0]) if found else None


def refuse_shared_turns(config: PretrainedConfig, longest: int, *, is_alone: bool) -> None:
    """ConfigError where documents up to `longest` tokens would move their neighbours; `is_alone`: they have none, and
    one process holds all of their tokens."""
    turn = turning_point(config)
    if turn and longest > turn[1] and not is_alone:
        raise ConfigError(
            f"data.seq_len: a document has {longest} tokens, and {config.get_text_config().model_type}'s {turn[0]} "
            f"rotary embedding changes for the whole row beyond {turn[1]}: set data.seq_len={turn[1]}, or give each "
            f"document a forward pass of its own (data.packing=none, batch.tokens_per_micro_batch=data.seq_len, "
            f"parallel.sequence=1)"
        )
