"""Bytes of one rank, part by part, in each phase of a step. The fullest phase is the peak.

    gather   the forward pass begins (fsdp2), or has gathered all it will (zero3)
    loss     forward is done: all activations, the loss head, what stays gathered
    backward gradients are complete or being reduced, one layer's activations are left
    reduce   the last gradients to be reduced (fsdp2); update: the optimizer's step (zero3)
    save     a checkpoint is written and waited for; saving: it is written in the background of the next steps
    export   the model is written tensor by tensor, and the folder re-opened layer by layer
             (the last three are host memory; a CPU's own memory)

What each engine keeps is read off `sft_dist.parallel` and PyTorch; `benchmarks/estimate_check.py` compares with
measured peaks. ZeRO (Rajbhandari et al., 2020) is as `parallel.zero` sets DeepSpeed up.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.estimate.activations import activation_bytes, head_bytes, layer_activation_bytes
from sft_dist.estimate.architecture import Architecture
from sft_dist.estimate.layout import FP32, Layout
from sft_dist.estimate.tuning import Tuned

DDP_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb
ZERO_BUCKET_BYTES = 50_000_000 * FP32  # parallel.zero.BUCKET_ELEMENTS
ZERO_BUCKET_SHARE = 8  # parallel.zero.BUCKET_SHARE
ZERO3_LIVE_ELEMENTS = 10**9  # parallel.zero.LIVE_ELEMENTS
ZERO3_PREFETCH_ELEMENTS = 50_000_000  # parallel.zero.PREFETCH_ELEMENTS
ZERO3_MOVED_ELEMENTS = 10**9  # parallel.zero.MOVED_ELEMENTS
SAVE_FILE_BYTES = 2 * 2**30  # checkpoint.shards.FILE_BYTES
NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # of a weight: its code, an 8-bit scale for 64, and one in fp32 for 256 scales

Parts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Memory:
    """Parts by phase, on the device and (save, export) on the host."""

    device: dict[str, Parts]
    host: dict[str, Parts]

    @property
    def phase(self) -> str:
        """The fullest phase on the device."""
        return max(self.device, key=lambda name: sum(self.device[name].values()))

    @property
    def parts(self) -> Parts:
        return self.device[self.phase]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def host_peak(self) -> int:
        return max((sum(parts.values()) for parts in self.host.values()), default=0)


def memory(architecture: Architecture, tuned: Tuned, layout: Layout) -> Memory:
    """What one rank holds. On a CPU the phases of the host are phases of the device."""
    states = _states(tuned, layout)
    engine = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}.get(layout.strategy, _zero)
    steps = engine(architecture, tuned, layout, states)
    saved, in_background, exported = _writing(tuned, layout)
    offloaded = _offloaded(tuned, layout)
    if layout.device == "cuda":
        host = {"save": in_background if layout.saves_in_background else saved, "export": exported}
        host = {name: _kept(offloaded | parts) for name, parts in host.items()}
        return Memory({name: _kept(parts) for name, parts in steps.items()}, host)
    steps = {name: parts | offloaded for name, parts in steps.items()}
    resident = _between_steps(tuned, layout, states) | offloaded
    fullest = max(steps.values(), key=lambda parts: sum(parts.values()))
    meanwhile = {"saving": fullest | in_background} if layout.saves_in_background else {}
    writing = {"save": resident | saved, "export": resident | exported}
    return Memory({name: _kept(parts) for name, parts in (steps | meanwhile | writing).items()}, {})


def _between_steps(tuned: Tuned, layout: Layout, states: Parts) -> Parts:
    """What stays when a step is done and its gradients are given back: DDP's buckets, and ZeRO-3's partition of the
    gradients with the bucket that fills it."""
    held = {name: size for name, size in states.items() if name != "gradients"}
    if layout.strategy == "ddp" and layout.world_size > 1:
        return held | {"communication": states["gradients"]}
    if layout.strategy == "zero3":
        return held | {"gradients": states["gradients"], "communication": _zero_bucket(tuned, ZERO_BUCKET_SHARE)}
    return held


def weight_bytes(tuned: Tuned, layout: Layout) -> int:
    """All weights: a frozen base in the compute dtype or in 4 bits, what is trained in the master dtype; stage 3 has
    its fp32 masters with the optimizer."""
    moved = layout.compute if layout.strategy == "zero3" else layout.master
    base = moved if tuned.trains_all else layout.compute
    in_layers = (tuned.base - tuned.root.base) * (NF4_BYTES if tuned.quantised else base)
    return int(in_layers) + tuned.root.base * base + tuned.added * moved


def optimizer_bytes(tuned: Tuned, layout: Layout) -> int:
    """What `optim.name` keeps of all trained weights: `sft_dist.optim`. Rows and columns of Adafactor are next to
    nothing beside the weights; AdamW's 8 bits count their scales, but not that small tensors keep 32."""
    match layout.optimizer:
        case "adamw8bit":
            return int(2 * tuned.trained * (1 + FP32 / 256))
        case "adafactor":
            return 0
        case "muon":  # one momentum where AdamW has two, but for embedding and head
            return (tuned.trained + tuned.root.trained) * layout.master
        case _:
            return 2 * tuned.trained * layout.master


def checkpoint_bytes(tuned: Tuned, layout: Layout) -> int:
    """What all ranks together write: trained weights and the optimizer's tensors; ZeRO's are fp32."""
    master = FP32 if layout.strategy.startswith("zero") else layout.master
    return tuned.trained * master + optimizer_bytes(tuned, layout)


def _states(tuned: Tuned, layout: Layout) -> Parts:
    """Weights, gradients and optimizer as the engine holds them between steps; gradients when they are complete."""
    weights, world, shards = weight_bytes(tuned, layout), layout.world_size, layout.shards
    gradients, moments = tuned.trained * layout.master, optimizer_bytes(tuned, layout)
    masters = tuned.trained * FP32
    match layout.strategy:
        case "ddp":
            return {"weights": weights, "gradients": gradients, "optimizer": moments}
        case "fsdp2":
            return {"weights": weights // shards, "gradients": gradients // shards, "optimizer": moments // shards}
        case "zero1":
            states = {"weights": weights, "gradients": gradients}
        case "zero2":
            states = {"weights": weights, "gradients": gradients // world}
        case _:
            states = {"weights": weights // world, "gradients": gradients // world}
    if layout.offload == "params":
        states["weights"] = 0
    if layout.offload != "none" and layout.strategy == "zero3":
        states["gradients"] = 0
    optimizer = (masters + 2 * tuned.trained * FP32) // world
    return states | {"optimizer": optimizer if layout.offload == "none" else 0}


def _ddp(architecture: Architecture, tuned: Tuned, layout: Layout, states: Parts) -> dict[str, Parts]:
    """Replicas. DDP's buckets persist and are the gradients; micro-batches that are not reduced add up outside them."""
    head = head_bytes(architecture, tuned, layout)
    buckets = states["gradients"] if layout.world_size > 1 else 0
    summed = states["gradients"] if layout.rounds > 1 or layout.world_size == 1 else 0
    held = {"weights": states["weights"], "optimizer": states["optimizer"], "communication": buckets}
    casts = _autocast_copies(tuned, layout)
    loss = held | {
        "gradients": summed if layout.rounds > 1 else 0,
        "copies for compute": casts,
        "activations": activation_bytes(architecture, tuned, layout),
        **head,
    }
    flying = min(DDP_BUCKET_BYTES, buckets)
    backward = held | {
        "gradients": summed,
        "communication": buckets + flying,
        "gradient of the head": head["gradient of the head"] if layout.world_size > 1 else 0,
        "activations": layer_activation_bytes(architecture, tuned, layout),
    }
    return {"loss": loss, "backward": backward}


def _fsdp2(architecture: Architecture, tuned: Tuned, layout: Layout, states: Parts) -> dict[str, Parts]:
    """Shards. The root group (embedding, last norm, head) stays gathered from forward to backward; a layer is gathered
    for its turn while the next one arrives. Sums of earlier micro-batches are sharded too."""
    world, c = layout.shards, layout.compute
    root = c * (tuned.root.base + tuned.root.added)
    layer = int(tuned.layer.base * (NF4_BYTES if tuned.quantised else c)) + c * tuned.layer.added
    moved_root, moved_layer = tuned.root.trained, tuned.layer.trained
    held = {"weights": states["weights"], "optimizer": states["optimizer"]}
    before = tuned.trained * FP32 // world if layout.rounds > 1 else 0
    of_layers = before or (tuned.trained - moved_root) * layout.master // world
    copies = 2 if layout.device == "cpu" and world > 1 else 1 if world > 1 else 0  # gloo adds one
    first = held | {"gradients": before, "gathered layers": (1 + copies) * root + layer}
    head = head_bytes(architecture, tuned, layout)
    loss = held | {
        "gradients": before,
        "gathered layers": root + 2 * layer,
        "activations": activation_bytes(architecture, tuned, layout),
        **head,
    }
    under_way = 0 if before else 2 * moved_layer * layout.master // world  # of the last two layers: not reduced yet
    backward = held | {
        "gradients": max(0, of_layers - under_way),
        "gathered layers": root + 2 * layer,
        "communication": moved_layer * (c + 2 * FP32),  # a layer's own gradients, and two on their way
        "gradient of the head": head["gradient of the head"] * c // FP32,
        "activations": layer_activation_bytes(architecture, tuned, layout),
    }
    last = held | {"gradients": of_layers, "communication": moved_root * (c + FP32 + layout.master // world)}
    return {"gather": first, "loss": loss, "backward": backward, "reduce": last}


def _zero(architecture: Architecture, tuned: Tuned, layout: Layout, states: Parts) -> dict[str, Parts]:
    """DeepSpeed's stages 1 and 2. A bucket is filled from gradients that live until it is reduced."""
    bucket = _zero_bucket(tuned)
    held = states | {"communication": bucket}
    if layout.strategy == "zero2":
        held["gradients"] = max(states["gradients"], bucket)
    loss = held | {
        "copies for compute": _autocast_copies(tuned, layout),
        "activations": activation_bytes(architecture, tuned, layout),
        **head_bytes(architecture, tuned, layout),
    }
    return {"loss": loss}


def _zero3(architecture: Architecture, tuned: Tuned, layout: Layout, states: Parts) -> dict[str, Parts]:
    """DeepSpeed's stage 3. Weights are gathered until a billion elements are alive, and what is prefetched together is
    there twice: as the ranks' pieces and as the parameters that are put together from them. By then the forward pass is
    as far as what was gathered before. A rank alone uses its partition as it is, where it lies on the device. The
    optimizer's step takes a copy of the partition of the gradients, beside the partition and its bucket."""
    elements, bucket = tuned.base + tuned.added, _zero_bucket(tuned, ZERO_BUCKET_SHARE)
    is_brought = layout.world_size > 1 or (layout.offload == "params" and layout.device != "cpu")
    each = weight_bytes(tuned, layout) / elements if is_brought else 0.0
    alive = min(elements, ZERO3_LIVE_ELEMENTS)
    beyond_embedding = max(0, alive - architecture.vocab_size * architecture.hidden_size)
    prefetched = min(beyond_embedding, ZERO3_PREFETCH_ELEMENTS) if layout.world_size > 1 else 0
    activations, head = activation_bytes(architecture, tuned, layout), head_bytes(architecture, tuned, layout)
    gathered = states | {"gathered layers": int(alive * each)}
    gather = gathered | {
        "communication": bucket + int(prefetched * each),
        "activations": activations * (alive - prefetched) // alive,
    }
    loss = gathered | {"communication": 2 * bucket, "activations": activations, **head}
    moved = min(tuned.trained // layout.world_size, ZERO3_MOVED_ELEMENTS) * FP32 if layout.offload == "none" else 0
    return {"gather": gather, "loss": loss, "update": states | {"communication": bucket, "gradients to apply": moved}}


def _zero_bucket(tuned: Tuned, share: int = 1) -> int:
    """Bytes of one, which has room for 1/`share` of what is trained."""
    return min(ZERO_BUCKET_BYTES, tuned.trained * FP32 // share)


def _autocast_copies(tuned: Tuned, layout: Layout) -> int:
    """Autocast keeps its casts of trained fp32 matrices from their use to the end of backward; the head has its own."""
    if not layout.autocasts or layout.master != FP32:
        return 0
    return (tuned.trained - tuned.root.trained) * layout.compute


def _writing(tuned: Tuned, layout: Layout) -> tuple[Parts, Parts, Parts]:
    """What is added by a save that is waited for, by one in the background, by the export. Each rank writes an equal
    part of the state; a file is built twice before it is written (as the bytes of its tensors and as its own). What is
    no CPU tensor of the run is gathered or brought over first. An export goes out tensor by tensor, rank 0 re-opens it.
    """
    is_zero, state = layout.strategy.startswith("zero"), checkpoint_bytes(tuned, layout)
    written = state // layout.world_size
    local = {"ddp": state, "fsdp2": state // layout.shards}.get(layout.strategy, written)
    file = {"file": 2 * min(SAVE_FILE_BYTES, written)}
    brought = {"state to write": written if is_zero or layout.device == "cuda" else 0}
    export = _exporting(tuned, layout) if tuned.trains_all else weight_bytes(tuned, layout)
    return file | brought, file | {"copy of the state": local}, {"export": export}


def _exporting(tuned: Tuned, layout: Layout) -> int:
    """A whole model, re-opened with one layer at a time (an adapter is proven on its base). On a CPU FSDP2's gathers
    for the probe take more: measured with two models."""
    root, layer = layout.master * tuned.root.base, layout.master * tuned.layer.base
    gathers = layout.strategy == "fsdp2" and layout.shards > 1 and layout.device == "cpu"
    return 2 * root + 3 * layer if gathers else root + layer


def _offloaded(tuned: Tuned, layout: Layout) -> Parts:
    """What `parallel.offload` puts into host memory instead."""
    if layout.offload == "none":
        return {}
    moved = (
        5 * tuned.trained * FP32 // layout.world_size
    )  # masters, two moments; gradients as summed and as stepped with
    weights = weight_bytes(tuned, layout) // layout.world_size if layout.offload == "params" else 0
    return {"offloaded": moved + weights}


def _kept(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size}
