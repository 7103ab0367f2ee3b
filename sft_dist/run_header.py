"""What the user sees of a run before its first step."""

from __future__ import annotations

from sft_dist.observe.header import batch_equation, certificate_line, count
from sft_dist.parallel.engine import global_numel
from sft_dist.parts import Parts


def header_rows(parts: Parts, attempt: int) -> list[tuple[str, str]]:
    """What the user sees before the first step."""
    recipe, choices, plan, place = parts.recipe, parts.choices, parts.train.plan, parts.place
    trained = sum(map(global_numel, parts.engine.trained.values()))
    total = sum(map(global_numel, parts.engine.model.parameters()))
    offloaded = "" if recipe.parallel.offload == "none" else f"{recipe.parallel.offload} offloaded, "
    replicas = recipe.parallel.dp_replicate
    mesh = "" if replicas == 1 else f"{replicas} replicas x {place.world_size // replicas} shards, "
    shared_by = recipe.parallel.sequence
    cut_among = "" if shared_by == 1 else f", each row cut among {shared_by} (sequence parallel)"
    store = parts.inputs.data.train
    so_far = " in the first window of a stream" if recipe.data.streams else ""
    return [
        ("run", f"{recipe.run.name} in {recipe.run.dir}, attempt {attempt}, seed {recipe.run.seed}"),
        (
            "model",
            f"{parts.engine.model.config.model_type} {recipe.model.path or ''} ({recipe.model.init}), "  # type: ignore[union-attr]
            f"{count(total)} parameters, {count(trained)} trained ({recipe.tuning.method}), "
            f"compute {choices.compute}, master {recipe.precision.master}",
        ),
        (
            "data",
            f"{len(store):,} examples, {store.num_tokens:,} tokens{so_far}, {store.supervised_share:.1%} supervised, "
            f"{len(parts.inputs.data.eval or ()):,} held out, template {parts.inputs.data.template.name}",
        ),
        (
            "engine",
            f"{parts.engine.name}, {offloaded}{mesh}{place.world_size} process(es) on {place.device.type}, "
            f"{place.num_threads} thread(s) each{cut_among}; {choices.strategy_reason or 'as recorded'}",
        ),
        (
            "batch",
            batch_equation(
                choices.packs_per_micro_batch,
                recipe.data.seq_len,
                choices.micro_batches_per_step,
                place.world_size,
                shared_by,
            ),
        ),
        (
            "plan",
            f"{plan.num_steps} optimizer steps, packing {recipe.data.packing}, {plan.efficiency:.1%} of slots filled",
        ),
        (
            "optimizer",
            f"{recipe.optim.name}, lr {choices.lr:g} {recipe.optim.schedule}, "
            f"activation checkpointing {choices.activation_checkpointing}"
            + (", offloaded" if recipe.memory.activation_offload else "")
            + (", compiled layers" if recipe.precision.compile else ""),
        ),
        *parts.kernels,
        ("certificate", certificate_line([(c.name, c.figure, c.limit) for c in parts.checks])),
    ]
