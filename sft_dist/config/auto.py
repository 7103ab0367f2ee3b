"""What `auto` becomes: pure functions from facts (model, data, machine) to numbers, each recorded in the run.

Decided once, when a run is new; a resumed run reads its own record, so another world size changes nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from sft_dist.config.compatibility import refusal
from sft_dist.config.elastic import ELASTIC, NOMINAL_RANKS
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError

AIM_STEPS = 200  # a run on small data should see about this many optimizer steps
FEW_STEPS = 50  # below this the header warns
MAX_AUTO_STEP_TOKENS = 524_288
CPU_MICRO_BATCH_TOKENS = 4_096
BYTES_PER_TRAINED = 16  # fp32 weight, gradient and two moments
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known before the first step. Counts are of the training split; memory is per process."""

    num_parameters: int
    num_trained: int
    hidden_size: int
    num_layers: int
    num_train_tokens: int
    num_train_examples: int
    world_size: int
    device: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Choices:
    """The numbers a run works with. `micro_batches_per_step` is global; None when a step is a number of examples."""

    packs_per_micro_batch: int
    micro_batches_per_step: int | None
    lr: float
    strategy: str
    activation_checkpointing: str
    compute: str  # dtype of forward and backward

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def choose(recipe: Recipe, facts: Facts) -> Choices:
    """Every `auto` that defines the numbers of a run. Raises ConfigError when the recipe rules out what was chosen."""
    if recipe.run.deterministic == ELASTIC:
        facts = replace(facts, world_size=NOMINAL_RANKS)
    strategy = _strategy(recipe, facts)
    if found := refusal(recipe, strategy):
        raise ConfigError(found)
    checkpointing = _activation_checkpointing(recipe, facts)
    micro_tokens = _micro_batch_tokens(recipe, facts, checkpointing)
    step_tokens = _step_tokens(recipe, facts, micro_tokens)
    return Choices(
        packs_per_micro_batch=micro_tokens // recipe.data.seq_len,
        micro_batches_per_step=None if recipe.batch.examples_per_step else step_tokens // micro_tokens,
        lr=_learning_rate(recipe, facts),
        strategy=strategy,
        activation_checkpointing=checkpointing,
        compute=compute_dtype(recipe, facts.device),
    )


def refuse_uneven(recipe: Recipe, world_size: int) -> None:
    """ConfigError where `parallel.sequence` does not divide the processes."""
    size = recipe.parallel.sequence
    if world_size % size:
        raise ConfigError(
            f"parallel.sequence={size}: {world_size} process(es) cannot form groups of {size}; "
            f"start {-(-world_size // size) * size}, or set another parallel.sequence"
        )


def compute_dtype(recipe: Recipe, device: str) -> str:
    """bfloat16 where the hardware multiplies it faster; a CPU without such units is about ten times slower with it."""
    asked = recipe.precision.compute
    return asked if asked != "auto" else "bfloat16" if device == "cuda" else "float32"


def cadence(value: int | str, num_steps: int, parts: int) -> int:
    """`every_steps: auto` means `parts` times in a run."""
    return max(1, num_steps // parts) if isinstance(value, str) else value


def _learning_rate(recipe: Recipe, facts: Facts) -> float:
    """Full: 2e-3 at 0.26 M parameters (measured) falling with the square root of size to about 1e-5 at 8 B, where the
    field's full fine-tunes sit. Adapters take ten times that, at most 5e-3 (Hu et al., 2021 use 2e-4 at 7 B)."""
    if recipe.optim.lr != "auto":
        return recipe.optim.lr
    if recipe.optim.name == "adafactor":
        return 1e-2  # bounds a step relative to the weights; Shazeer and Stern, 2018
    full = min(2e-3, max(1e-5, 2e-3 * (2.6e5 / facts.num_parameters) ** 0.5))
    lr = full if recipe.tuning.method == "full" else min(5e-3, 10 * full)
    return float(f"{lr:.2g}")


def _strategy(recipe: Recipe, facts: Facts) -> str:
    """Replicas while weights, gradients and moments fill less than 60 % of a process's memory, else shards; ZeRO where
    something is to be offloaded."""
    if recipe.parallel.strategy != "auto":
        return recipe.parallel.strategy
    if recipe.run.deterministic == ELASTIC:
        return "fsdp2"
    if recipe.parallel.offload != "none":
        return {"optimizer": "zero2", "params": "zero3"}[recipe.parallel.offload]
    state = 4 * facts.num_parameters + (BYTES_PER_TRAINED - 4) * facts.num_trained
    return "fsdp2" if facts.world_size > 1 and state > 0.6 * facts.memory_bytes else "ddp"


def _activation_checkpointing(recipe: Recipe, facts: Facts) -> str:
    """Full when one pack's activations (about 34 bytes per token, layer and hidden unit in bf16; Korthikanti et al.,
    2022) would fill more than half of the memory."""
    if recipe.memory.activation_checkpointing != "auto":
        return recipe.memory.activation_checkpointing
    return "full" if recipe.data.seq_len * _activation_bytes(recipe, facts) > 0.5 * facts.memory_bytes else "none"


def _micro_batch_tokens(recipe: Recipe, facts: Facts, checkpointing: str) -> int:
    seq_len, asked = recipe.data.seq_len, recipe.batch.tokens_per_micro_batch
    if asked != "auto":
        return asked
    if recipe.data.packing == "none":
        return seq_len
    fits = int(0.3 * facts.memory_bytes / (_activation_bytes(recipe, facts) / (10 if checkpointing == "full" else 1)))
    ceiling = CPU_MICRO_BATCH_TOKENS if facts.device == "cpu" else 4 * CPU_MICRO_BATCH_TOKENS
    tokens = max(seq_len, min(fits, ceiling) // seq_len * seq_len)
    if recipe.batch.tokens_per_step != "auto":  # the step was fixed: give every rank a share of it and divide it evenly
        packs = recipe.batch.tokens_per_step // seq_len
        share = max(1, min(tokens // seq_len, packs // _num_groups(recipe, facts)))
        return seq_len * max(k for k in range(1, share + 1) if packs % k == 0)
    per_rank = _aimed_step_tokens(recipe, facts) // _num_groups(recipe, facts) // seq_len * seq_len
    return max(seq_len, min(tokens, per_rank))


def _step_tokens(recipe: Recipe, facts: Facts, micro_tokens: int) -> int:
    asked = recipe.batch.tokens_per_step
    if asked != "auto":
        if asked % micro_tokens:
            raise ConfigError(
                f"batch.tokens_per_step={asked} must be a multiple of tokens_per_micro_batch={micro_tokens}"
            )
        return asked
    aimed = _aimed_step_tokens(recipe, facts)
    return max(_num_groups(recipe, facts), aimed // micro_tokens) * micro_tokens


def _aimed_step_tokens(recipe: Recipe, facts: Facts) -> int:
    """Tokens per optimizer step that give about AIM_STEPS steps, within [seq_len, MAX_AUTO_STEP_TOKENS]."""
    total = facts.num_train_tokens * recipe.optim.epochs
    return max(recipe.data.seq_len, min(MAX_AUTO_STEP_TOKENS, total // AIM_STEPS))


def _num_groups(recipe: Recipe, facts: Facts) -> int:
    """How many micro-batches are worked on at a time: one by each group of `parallel.sequence` processes."""
    return max(1, facts.world_size // recipe.parallel.sequence)


def _activation_bytes(recipe: Recipe, facts: Facts) -> float:
    """Bytes of activations that a token of the row costs each rank without checkpointing; twice the bf16 figure in
    float32 on a CPU."""
    return (68 if facts.device == "cpu" else 34) * facts.num_layers * facts.hidden_size / recipe.parallel.sequence
