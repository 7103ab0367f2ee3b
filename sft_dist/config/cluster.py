"""The recipe's `cluster:` section: machines, the scheduler's flags, what is set up before a run.

Every value ends as one argument of a program and never in the text of a script; patterns keep out what Slurm would read
as something else.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sft_dist.config.section import Auto, Positive, Section

SECRET_VARIABLE = "SFT_RUN_SECRET"  # how launchers hand a secret of this start to ranks on all nodes
WARNING_SECONDS = 300  # before the time limit: longer than one step and one save, and Slurm is late by up to a minute
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@+*&|()\[\]=-]+$")]  # what Slurm's own names are made of


class ContainerSection(Section):
    image: str | None = None  # null: none
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[Annotated[str, Field(pattern=r"^[^\n,]+$")]] = []  # HOST:INSIDE
    python: str = "python3"  # the interpreter inside the image that has sft_dist


class ClusterSection(Section):
    """Where a run takes place. Nothing here changes its numbers, but how many processes add them up."""

    target: Literal["local", "ssh", "slurm"] = "local"
    nodes: Positive = 1
    gpus_per_node: Annotated[int, Field(ge=0)] | Auto = "auto"  # auto: ask for none by number, use what is there
    processes_per_node: Positive | Auto = "auto"  # auto: one per GPU, else one
    hosts: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$")]] = []  # ssh: the first one listens
    launcher: Literal["local", "torchrun", "accelerate", "deepspeed"] = "local"  # local: sft-dist's own
    fabric: Literal["auto", "none", "ethernet", "infiniband", "efa"] = "auto"  # settings of launch/env/
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = (
        None  # ranks of several nodes talk by it
    )
    environment: dict[str, str] = {}  # variables of the workers; no secrets: they stand in the run folder
    setup: list[str] = []  # shell lines before anything else, such as `module load cuda`
    preflight: bool = True  # look at every node before ranks start
    exclude_bad_nodes: bool = True  # requeue without a node that the preflight finds bad
    # Slurm
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] | None = None  # minutes, H:MM:SS, D-HH:MM:SS
    constraint: Word | None = None
    exclude: Word | None = None
    gres: Word | None = None  # gpu:h100:8, instead of gpus_per_node where a site wants it
    exclusive: bool = True
    dependency: Word | None = None
    array: list[Annotated[int, Field(ge=0, lt=2**63)]] = []  # seeds: one run each, in RUN_DIR/seed-N
    chain: Positive = 1  # jobs one after another, for sites that forbid requeueing
    requeue: bool = True
    stop_seconds: Annotated[int, Field(ge=1, le=65535)] | Auto = "auto"  # before the limit: checkpoint, go on anew
    sbatch: list[Annotated[str, Field(pattern=r"^--?[A-Za-z][^\n]*$")]] = []  # further flags, one each
    srun: list[Annotated[str, Field(pattern=r"^--?[A-Za-z][^\n]*$")]] = []
    container: ContainerSection = ContainerSection()

    @model_validator(mode="after")
    def _has_what_the_target_needs(self) -> ClusterSection:
        if self.target == "ssh" and not self.hosts:
            raise ValueError("cluster.target=ssh needs cluster.hosts: the names of the machines")
        if self.hosts and self.nodes not in (1, len(self.hosts)):
            raise ValueError(f"cluster.nodes={self.nodes} but cluster.hosts names {len(self.hosts)}: leave nodes out")
        if 0 < limit_seconds(self.time or "0") <= self.warning_seconds:
            raise ValueError(
                f"cluster.stop_seconds={self.stop_seconds} in a job of cluster.time={self.time}: it would be asked to "
                "stop as it starts; set a shorter stop_seconds, or auto"
            )
        if self.gres and self.gpus_per_node != "auto":
            raise ValueError(f"cluster.gres={self.gres} and cluster.gpus_per_node={self.gpus_per_node}: give one")
        if len(set(self.array)) < len(self.array):
            raise ValueError("cluster.array names a seed twice: each is a run of its own")
        if self.array and self.chain > 1:
            raise ValueError("cluster.array and cluster.chain exclude each other: submit one chain for each seed")
        return self

    @property
    def warning_seconds(self) -> int:
        """How long before its limit a job is asked to stop: `stop_seconds`, of a short job a fifth of its time."""
        if self.stop_seconds != "auto":
            return self.stop_seconds
        limit = limit_seconds(self.time or "0")
        return min(WARNING_SECONDS, limit // 5) if limit else WARNING_SECONDS


def limit_seconds(time: str) -> int:
    """Seconds of a limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. 0: no limit."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))
