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
REPLICATED_SHARE = 0.6  # of the memory that replicas may fill with state; the rest is for activations
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
    intermediate_size: int = 0  # of the MLP; 0: not told, four times the hidden size


@dataclass(frozen=True, slots=True)
class Choices:
    """The numbers a run works with. `micro_batches_per_step` is global; None when a step is a number of examples."""

    packs_per_micro_batch: int
    micro_batches_per_step: int | None
    lr: float
    strategy: str
    activation_checkpointing: str
    compute: str  # dtype of forward and backward
    strategy_reason: str = ""  # for the header

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def choose(recipe: Recipe, facts: Facts) -> Choices:
    """Every `auto` that defines the numbers of a run. Raises ConfigError when the recipe rules out what was chosen."""
    if recipe.run.deterministic == ELASTIC:
        facts = replace(facts, world_size=NOMINAL_RANKS)
    strategy, reason = _strategy(recipe, facts)
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
        strategy_reason=reason,
    )


def refuse_uneven(recipe: Recipe, world_size: int) -> None:
    """ConfigError where `parallel.sequence` or `parallel.dp_replicate` does not cut the processes into equal groups."""
    size, replicas = recipe.parallel.sequence, recipe.parallel.dp_replicate
    if world_size % size:
        raise ConfigError(
            f"parallel.sequence={size}: {world_size} process(es) cannot form groups of {size}; "
            f"start {-(-world_size // size) * size}, or set another parallel.sequence"
        )
    if world_size % replicas:
        raise ConfigError(
            f"parallel.dp_replicate={replicas}: {world_size} process(es) cannot form {replicas} equal replicas; "
            f"start a multiple of {replicas}, or set another parallel.dp_replicate"
        )
    if replicas > 1 and world_size == replicas:
        raise ConfigError(
            f"parallel.dp_replicate={replicas} on {world_size} process(es) leaves shards of one process: "
            "set parallel.strategy=ddp and dp_replicate=1, or start more processes"
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


def _strategy(recipe: Recipe, facts: Facts) -> tuple[str, str]:
    """(name, why). Replicas while weights, gradients and moments fill less than REPLICATED_SHARE of a process's memory,
    else shards; ZeRO where something is to be offloaded."""
    parallel = recipe.parallel
    if parallel.strategy != "auto":
        return parallel.strategy, "as the recipe says"
    if recipe.run.deterministic == ELASTIC:
        return "fsdp2", "run.deterministic=elastic needs its sums"
    if parallel.dp_replicate > 1:
        return "fsdp2", f"parallel.dp_replicate={parallel.dp_replicate} is a mesh of it"
    if parallel.offload != "none":
        named = {"optimizer": "zero2", "params": "zero3"}[parallel.offload]
        return named, f"the engine for parallel.offload={parallel.offload}"
    state = 4 * facts.num_parameters + (BYTES_PER_TRAINED - 4) * facts.num_trained
    share = state / facts.memory_bytes
    fills = f"{_size(state)} of weights, gradients and moments in {_size(facts.memory_bytes)} per process"
    if facts.world_size == 1:
        return "ddp", f"one process has nobody to share with: {fills}, {share:.0%}"
    if share <= REPLICATED_SHARE:
        return "ddp", f"replicas are fastest and fit: {fills}, {share:.0%} <= {REPLICATED_SHARE:.0%}"
    sharded = share / facts.world_size
    advice = "" if sharded <= REPLICATED_SHARE else "; still more than that: add processes, or set parallel.offload"
    return "fsdp2", f"{fills}, {share:.0%} > {REPLICATED_SHARE:.0%}; sharded {sharded:.0%} each{advice}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _activation_checkpointing(recipe: Recipe, facts: Facts) -> str:
    """Full when one pack's activations would fill more than half of the memory."""
    if recipe.memory.activation_checkpointing != "auto":
        return recipe.memory.activation_checkpointing
    if recipe.memory.activation_offload:
        return "full"
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
    """Bytes of activations that a token of the row costs each rank without checkpointing: what autograd keeps of layers
    with two norms, four projections and a gated MLP when replicas train all of it, which is the most any engine keeps
    (`estimate.memory` counts it exactly). In bf16 on GPUs that is 59 per layer and hidden unit of an 8 B Llama, in
    float32 on CPUs 94."""
    unit, inner = (31, 8) if facts.device == "cuda" else (38, 16)
    intermediate = facts.intermediate_size or 4 * facts.hidden_size
    return facts.num_layers * (unit * facts.hidden_size + inner * intermediate) / recipe.parallel.sequence
