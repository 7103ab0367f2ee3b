"""The recipe as a typed tree. Unknown keys are refused at every level; every key here does something.

Words choose variants, never import paths. What each value may be stands beside it; what may not be combined is in
`compatibility`.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sft_dist.config.cluster import ClusterSection
from sft_dist.config.compatibility import refusal
from sft_dist.config.section import Auto, Fraction, Positive, Section
from sft_dist.config.streams import check_streams


class RunSection(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    dir: str = "runs/run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deterministic: bool | Literal["elastic"] = (
        False  # the same bits each time; elastic: on 1, 2, 4, 8 ... processes too
    )


class ModelSection(Section):
    path: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    config: dict[str, Any] | None = None  # the architecture, for init: random; needs `model_type`
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _has_weights_or_architecture(self) -> ModelSection:
        if self.init == "pretrained" and not self.path:
            raise ValueError("path is missing: name a folder or a hub id, or set model.init=random with model.config")
        if self.init == "random" and not (self.config or self.path):
            raise ValueError("config is missing: init: random needs the architecture (model_type, hidden_size, ...)")
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("trust_remote_code needs model.revision pinned to a 40-digit commit")
        return self


class PrecisionSection(Section):
    compute: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs, float32 on CPUs
    master: Literal["float32", "bfloat16"] = "float32"
    stochastic_rounding: bool = False  # of bfloat16 masters and moments, so that small updates are not lost
    compile: bool = False  # torch.compile, layer by layer

    @model_validator(mode="after")
    def _masters_are_not_narrower(self) -> PrecisionSection:
        if self.compute == "float32" and self.master == "bfloat16":
            raise ValueError(
                "precision.master=bfloat16 needs precision.compute=bfloat16: masters are never narrower than compute"
            )
        if self.stochastic_rounding and self.master != "bfloat16":
            raise ValueError(
                "precision.stochastic_rounding needs precision.master=bfloat16: float32 masters lose no small update"
            )
        return self


class TuningSection(Section):
    method: Literal["full", "lora", "rslora", "dora", "qlora", "prefix", "prompt", "bitfit"] = "full"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"
    modules_to_save: list[str] = []
    freeze: list[str] = []  # patterns of parameter names kept fixed (full)
    virtual_tokens: Positive = 20  # learned positions before every document (prefix, prompt)

    @property
    def is_low_rank(self) -> bool:
        """LoRA or one of its relatives: matrices beside the base's own."""
        return self.method in ("lora", "rslora", "dora", "qlora")

    @property
    def adds_adapter(self) -> bool:
        """What is trained stands beside the base model, in a folder of its own."""
        return self.method not in ("full", "bitfit")

    @model_validator(mode="after")
    def _applies_what_is_set(self) -> TuningSection:
        if self.freeze and self.method != "full":
            raise ValueError(f"tuning.freeze needs tuning.method=full: {self.method} trains only what it adds")
        for key in ("dropout", "modules_to_save"):
            if getattr(self, key) and not self.is_low_rank:
                raise ValueError(f"tuning.{key} needs tuning.method=lora, rslora, dora or qlora, not {self.method}")
        return self


class SourceSection(Section):
    path: str  # file, folder, glob, URL such as s3://..., or the id of a data set of the hub
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "dolly",
        "prompt_completion",
        "question_answer",
        "chain_of_thought",
        "self_instruct",
        "natural_instructions",
        "oasst",
        "tokenized",
        "text",
        "template",
    ] = "auto"
    columns: dict[str, Annotated[int, Field(ge=0)] | str] = {}  # our field -> theirs; a number: tables without a header
    template: str | None = None  # file of instruction forms, for format: template
    quotes: bool = True  # CSV, TSV: "a, b" is one cell
    escapes: bool = False  # CSV, TSV: a written-out \n is a line end, \t a tab
    split: str | None = None  # of a data set of the hub; train by default
    subset: str | None = None
    revision: str | None = None  # commit or tag of a data set of the hub
    streaming: bool = False  # too big to index: read while training goes on; needs optim.max_steps
    weight: Annotated[float, Field(gt=0)] = 1.0  # copies per epoch; 0.5 takes half the rows, 2.0 each row twice
    repeat: Positive | None = None  # copies per epoch whatever data.mixture_temperature says; instead of weight

    @model_validator(mode="after")
    def _forms_have_a_file(self) -> SourceSection:
        if (self.format == "template") != (self.template is not None):
            raise ValueError("template=FILE and format=template belong together: set both, or neither")
        return self

    @model_validator(mode="after")
    def _is_weighed_in_one_way(self) -> SourceSection:
        if self.repeat and self.weight != 1.0:
            raise ValueError(f"weight={self.weight:g} and repeat={self.repeat}: give one of them")
        return self


class ScoreSection(Section):
    column: str  # of the record, before anything is renamed
    min: float


class FiltersSection(Section):
    """What to leave out; the defaults leave out nothing."""

    min_answer_tokens: Annotated[int, Field(ge=0)] = 0
    max_repetition: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0  # share of repeated 4-grams in an answer
    drop_refusals: bool = False
    score: ScoreSection | None = None


class DataSection(Section):
    sources: Annotated[list[SourceSection], Field(min_length=1)]
    eval_sources: list[SourceSection] = []
    test_sources: list[SourceSection] = []
    eval_fraction: Fraction = 0.02
    test_fraction: Fraction = 0.0
    chat_template: str = "auto"
    seq_len: Annotated[int, Field(ge=8)] = 2048
    mixture_temperature: Annotated[float, Field(ge=1.0)] = 1.0  # above 1 raises the share of small sources
    long_examples: Literal["drop", "truncate", "split"] = "drop"
    packing: Literal["best_fit", "none", "padded"] = "best_fit"
    loss_on: Literal["assistant", "last_turn", "completion", "all"] = "assistant"
    prompt_loss_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    filters: FiltersSection = FiltersSection()
    near_duplicates: Literal["ignore", "together", "drop"] = "ignore"  # together: on one side of a split
    on_bad_record: Literal["stop", "skip"] = "stop"
    max_bad_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    cache_dir: str | None = None
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"  # processes that tokenise; 0: none besides this one

    @property
    def streams(self) -> list[SourceSection]:
        """The training sources that are streamed: all of them, or none."""
        return [source for source in self.sources if source.streaming]


class BatchSection(Section):
    tokens_per_micro_batch: Positive | Auto = "auto"
    tokens_per_step: Positive | Auto = "auto"
    examples_per_step: Positive | None = None


class OptimSection(Section):
    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.03
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None  # learning rate of LoRA's B over that of A
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None  # noise on embeddings while training
    epochs: Positive = 3
    max_steps: Positive | None = None
    stop_after_step: Positive | None = None


class ParallelSection(Section):
    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    offload: Literal["none", "optimizer", "params"] = "none"  # to CPU memory; `params` offloads the optimizer too
    sequence: Positive = 1  # processes that share each micro-batch, every one holding that part of its tokens
    dp_replicate: Positive = 1  # HSDP: replicas of the sharded model; the shards of one are neighbouring processes
    deepspeed_config: str | None = None  # a DeepSpeed JSON file whose settings are adopted, or refused

    @model_validator(mode="after")
    def _offloads_what_is_partitioned(self) -> ParallelSection:
        able = {"none": None, "optimizer": ("zero1", "zero2", "zero3"), "params": ("zero3",)}[self.offload]
        if able and self.strategy not in ("auto", *able):
            raise ValueError(
                f"parallel.offload={self.offload} needs parallel.strategy={' or '.join(able)} (or auto), "
                f"not {self.strategy}"
            )
        return self


class MemorySection(Section):
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    activation_offload: bool = False  # what full checkpointing keeps waits in host memory


class KernelsSection(Section):
    head: Literal["auto", "reference", "triton"] = "auto"


class CheckpointSection(Section):
    every_steps: Positive | Auto = "auto"
    keep: Annotated[int, Field(ge=2)] = 2
    background: bool = Field(True, alias="async")  # write while training goes on, from a copy in host memory
    resume: Literal["auto", "never"] = "auto"
    trust_world_writable: bool = False  # continue from a folder that anyone on the machine may have written into


class EvalSection(Section):
    every_steps: Positive | Auto = "auto"
    generate: Annotated[int, Field(ge=0)] = 8  # sample answers written at each evaluation
    exact_match: Annotated[int, Field(ge=0)] = 0  # held-out examples whose answer is checked before and after; 0 off
    max_new_tokens: Positive = 128
    early_stopping: Positive | None = None  # stop after this many evaluations without a better validation loss


class LogSection(Section):
    every_steps: Positive | Auto = "auto"
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    project: str | None = None  # of W&B; of MLflow the experiment
    group: str | None = None


class HubSection(Section):
    push_to: str | None = Field(None, pattern=r"^[\w][\w.-]*/[\w][\w.-]*$")  # owner/name: the export goes there
    private: bool = True  # whether a repository that is made for it is private


class ResilienceSection(Section):
    hang_seconds: Annotated[float, Field(ge=1.0)] | Auto = "auto"  # without a sign of life inside a step
    nonfinite: Literal["stop", "skip"] = "stop"  # skip: at most 3 steps in a row, 10 in all
    max_restarts: Annotated[int, Field(ge=0)] = 3  # by the local launcher, after a hang, a signal or a storage failure
    audit_every: Positive | None = None  # steps between proofs that all ranks hold and compute the same
    end_time: float | str = "auto"  # of the job, for a checkpoint before it; auto: what Slurm says; none: no limit
    end_margin_seconds: Annotated[float, Field(ge=0)] | Auto = "auto"  # 90, at most a tenth of what is left at start

    @field_validator("end_time")
    @classmethod
    def _is_a_moment(cls, value: float | str) -> float | str:
        if isinstance(value, str) and value not in ("auto", "none"):
            try:
                datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(
                    f"end_time={value}: must be auto, none, seconds since 1970 or a date and time like "
                    f"2026-01-31T18:00:00"
                ) from None
        return value


class Recipe(Section):
    """A whole run. `files < key=value` on top of these defaults."""

    run: RunSection = RunSection()
    model: ModelSection
    precision: PrecisionSection = PrecisionSection()
    tuning: TuningSection = TuningSection()
    data: DataSection
    batch: BatchSection = BatchSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    memory: MemorySection = MemorySection()
    kernels: KernelsSection = KernelsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    resilience: ResilienceSection = ResilienceSection()
    hub: HubSection = HubSection()
    cluster: ClusterSection = ClusterSection()

    @field_validator("kernels", mode="before")
    @classmethod
    def _kernels_by_one_word(cls, value: Any) -> Any:
        """`kernels: auto` and `kernels: reference` choose for all kernels at once."""
        return {"head": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combines_what_works_together(self) -> Recipe:
        if found := refusal(self):
            raise ValueError(found)
        return self

    @model_validator(mode="after")
    def _weighs_what_is_trained(self) -> Recipe:
        for role in ("eval_sources", "test_sources"):
            for number, source in enumerate(getattr(self.data, role)):
                if source.weight != 1.0 or source.repeat:
                    raise ValueError(
                        f"data.{role}.{number} has a weight or repeat: evaluation sources count once; leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _measures_on_held_out_data(self) -> Recipe:
        data, wanted = self.data, self.eval
        has_eval = bool(data.eval_fraction or data.eval_sources)
        if wanted.early_stopping and not has_eval:
            raise ValueError(
                f"eval.early_stopping={wanted.early_stopping} needs validation data: "
                "set data.eval_fraction or data.eval_sources"
            )
        if wanted.exact_match and not (has_eval or data.test_fraction or data.test_sources):
            raise ValueError(
                f"eval.exact_match={wanted.exact_match} needs held-out data: "
                "set data.test_fraction, data.test_sources or data.eval_fraction"
            )
        return self

    @model_validator(mode="after")
    def _cuts_packed_rows_only(self) -> Recipe:
        if self.parallel.sequence > 1 and self.data.packing == "padded":
            raise ValueError(
                f"parallel.sequence={self.parallel.sequence} cuts packed rows, and data.packing=padded has none: "
                "set data.packing=best_fit or none, or parallel.sequence=1"
            )
        return self

    @model_validator(mode="after")
    def _asks_of_streams_what_they_can(self) -> Recipe:
        check_streams(self)
        return self

    @model_validator(mode="after")
    def _budgets_are_multiples(self) -> Recipe:
        micro, step, seq_len = self.batch.tokens_per_micro_batch, self.batch.tokens_per_step, self.data.seq_len
        if micro != "auto" and micro % seq_len:
            raise ValueError(f"batch.tokens_per_micro_batch={micro} must be a multiple of data.seq_len={seq_len}")
        if step != "auto" and step % (seq_len if micro == "auto" else micro):
            of = f"data.seq_len={seq_len}" if micro == "auto" else f"batch.tokens_per_micro_batch={micro}"
            raise ValueError(f"batch.tokens_per_step={step} must be a multiple of {of}")
        if self.batch.examples_per_step and step != "auto":
            raise ValueError("batch.examples_per_step and batch.tokens_per_step exclude each other: keep one")
        return self
