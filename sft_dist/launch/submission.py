"""A run handed to Slurm: the files its job reads, and the sbatch command that hands it over.

    recipe --(files_of)--> RUN_DIR/slurm/recipe.yaml   the resolved recipe (of one member, in an array)
                           RUN_DIR/slurm/job.env       NAME=VALUE for the job's scripts
                           RUN_DIR/slurm/setup.sh      cluster.setup, sourced
                           RUN_DIR/slurm/srun.args     further words for srun, one a line
                           RUN_DIR/slurm/array         folders of an array's members, in the order of task ids
    recipe --(sbatch_command)--> the words of the command: flags sorted, then script, then RUN_DIR

What a user chose is an argument or the line of a file, never part of a script's text; a shell never reads it. All of it
is made by pure functions, so that `--dry-run` shows exactly what would happen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from sft_dist.config.cluster import ClusterSection
from sft_dist.config.loader import dump_recipe
from sft_dist.config.schema import Recipe
from sft_dist.config.shipped import CHECKOUT, INSTALLED
from sft_dist.errors import ConfigError, StorageError

JobKind = Literal["train", "prepare", "preflight"]
RECIPE, JOB_ENV, SETUP, SRUN_ARGS, ARRAY = "recipe.yaml", "job.env", "setup.sh", "srun.args", "array"
ENDINGS, JOBS = "endings.jsonl", "jobs.jsonl"
OWN_FLAGS = {  # flags the product builds itself -> the key that sets them, where there is one
    "account": "cluster.account",
    "array": "cluster.array",
    "chdir": "",
    "constraint": "cluster.constraint",
    "dependency": "cluster.dependency",
    "error": "",
    "exclude": "cluster.exclude",
    "exclusive": "cluster.exclusive",
    "gpus-per-node": "cluster.gpus_per_node",
    "gres": "cluster.gres",
    "job-name": "run.name",
    "nodes": "cluster.nodes",
    "ntasks": "",
    "ntasks-per-node": "",
    "open-mode": "",
    "output": "",
    "parsable": "",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "signal": "cluster.stop_seconds",
    "time": "cluster.time",
    "wrap": "",
}


def slurm_dir(run_dir: Path) -> Path:
    """`RUN_DIR/slurm`, where everything about the scheduler is."""
    return run_dir / "slurm"


def check_cluster(recipe: Recipe) -> None:
    """Refuse what cannot be handed to Slurm, by key. Raises ConfigError."""
    cluster, run_dir = recipe.cluster, recipe.run.dir
    if cluster.target != "slurm":
        raise ConfigError(f"cluster.target={cluster.target}: submit needs cluster.target=slurm, and its cluster: keys")
    if any(sign in run_dir for sign in "\n\\"):
        raise ConfigError(f"run.dir={run_dir!r}: Slurm cannot write below a name with line ends or \\: choose another")
    for key, flags in (("sbatch", cluster.sbatch), ("srun", cluster.srun)):
        for flag in flags:
            name = flag.lstrip("-").partition("=")[0]
            if flag.startswith("--") and name in OWN_FLAGS:
                remedy = f"set {OWN_FLAGS[name]} instead" if OWN_FLAGS[name] else "leave it out: submit sets it"
                raise ConfigError(f"cluster.{key}: {flag}: {remedy}")
    for name, value in cluster.environment.items():
        if "\n" in value or not name.replace("_", "a").isalnum() or name[:1].isdecimal():
            raise ConfigError(f"cluster.environment.{name}: must be a variable's name with a value of one line")
    if cluster.container.image and "\n" in cluster.container.image:
        raise ConfigError("cluster.container.image: must be one line")
    if cluster.launcher == "deepspeed" and cluster.nodes > 1:
        raise ConfigError("cluster.launcher=deepspeed starts one node only: use local, which runs zero1 to zero3")


def members(recipe: Recipe) -> dict[str, Recipe]:
    """Folder below run.dir ("" for a single run) -> the recipe of that run: one for each seed of `cluster.array`."""
    if not recipe.cluster.array:
        return {"": recipe}
    return {f"seed-{seed}": _member(recipe, seed) for seed in recipe.cluster.array}


def _member(recipe: Recipe, seed: int) -> Recipe:
    run = recipe.run.model_copy(update={"seed": seed, "dir": str(Path(recipe.run.dir) / f"seed-{seed}")})
    cache = recipe.data.cache_dir or str(Path(recipe.run.dir).parent / ".sft-cache")  # one for all seeds
    return recipe.model_copy(update={"run": run, "data": recipe.data.model_copy(update={"cache_dir": cache})})


def files_of(recipe: Recipe, submission: str, home: Path | None = None) -> dict[str, str]:
    """Name in RUN_DIR/slurm -> text, for one run. `submission` tells this one from earlier ones of the same folder."""
    cluster = recipe.cluster
    variables = {
        "HF_HUB_OFFLINE": str(int(not needs_hub(recipe))),
        **network_variables(cluster),
        **cluster.environment,
        "SFT_HOME": str(home or home_of_scripts()),
        "SFT_HOST_PYTHON": sys.executable,
        "SFT_LAUNCHER": cluster.launcher,
        "SFT_PREFLIGHT": str(int(cluster.preflight)),
        "SFT_PYTHON": cluster.container.python if cluster.container.image else sys.executable,
        "SFT_SUBMISSION": submission,
    }
    if (count := processes_per_node(cluster)) is not None:
        variables["SFT_NPROC"] = str(count)
    return {
        RECIPE: dump_recipe(recipe),
        JOB_ENV: "".join(f"{name}={value}\n" for name, value in sorted(variables.items())),
        SETUP: "".join(f"{line}\n" for line in cluster.setup),
        SRUN_ARGS: "".join(f"{word}\n" for word in srun_words(cluster, Path(recipe.run.dir).absolute(), Path.cwd())),
    }


def network_variables(cluster: ClusterSection) -> dict[str, str]:
    """What tells ranks which network to use between nodes."""
    named = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if cluster.interface else ()
    return {"SFT_FABRIC": cluster.fabric} | dict.fromkeys(named, f"{cluster.interface}")


def needs_hub(recipe: Recipe) -> bool:
    """Whether nodes must reach a hub while they train; else all they need was fetched on the login node."""
    return recipe.hub.push_to is not None or any(source.streaming for source in recipe.data.sources)


def processes_per_node(cluster: ClusterSection) -> int | None:
    """How many ranks a node gets; None: as many as it shows GPUs, else one."""
    if cluster.processes_per_node != "auto":
        return cluster.processes_per_node
    return cluster.gpus_per_node if isinstance(cluster.gpus_per_node, int) and cluster.gpus_per_node else None


def srun_words(cluster: ClusterSection, run_dir: Path, cwd: Path) -> list[str]:
    """The user's flags for srun, and what puts each task into the container: pyxis' flags, or apptainer's command."""
    box = cluster.container
    if not box.image:
        return list(cluster.srun)
    mounts = [*box.mounts, *(f"{path}:{path}" for path in dict.fromkeys([str(cwd), str(run_dir)]))]
    if box.runtime == "pyxis":
        flags = {"image": box.image, "mounts": ",".join(mounts), "workdir": str(cwd)}
        return [*cluster.srun, *(f"--container-{name}={value}" for name, value in flags.items())]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [*cluster.srun, "apptainer", "exec", "--nv", *binds, "--pwd", str(cwd), box.image]


def sbatch_command(recipe: Recipe, *, after: str | None = None, job: JobKind = "train") -> list[str]:
    """The words that submit the recipe's run; `after` is the job of the chain that must have ended before.

    `prepare` is a job of one node without GPUs; `preflight` gets the nodes of the run and is never requeued.
    """
    cluster, run_dir = for_job(recipe.cluster, job), Path(recipe.run.dir).absolute()
    output = str(slurm_dir(run_dir)).replace("%", "%%") + ("/%A_%a.out" if cluster.array else "/%j.out")
    chosen: dict[str, object] = {
        "account": cluster.account,
        "array": f"0-{len(cluster.array) - 1}" if cluster.array else None,
        "chdir": Path.cwd(),
        "constraint": cluster.constraint,
        "dependency": f"afterany:{after}" if after else cluster.dependency,
        "exclude": cluster.exclude,
        "gpus-per-node": None if cluster.gpus_per_node == "auto" else cluster.gpus_per_node or None,
        "gres": cluster.gres,
        "job-name": recipe.run.name,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "open-mode": "append",
        "output": output,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "signal": f"B:USR1@{cluster.warning_seconds}",
        "time": cluster.time,
    }
    flags = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    flags += ["--requeue" if cluster.requeue else "--no-requeue", "--parsable", *["--exclusive"] * cluster.exclusive]
    script = home_of_scripts() / "slurm" / f"{job}.sbatch"
    return ["sbatch", *sorted(flags), *cluster.sbatch, str(script), str(run_dir)]


def for_job(cluster: ClusterSection, job: JobKind) -> ClusterSection:
    """What the section asks for, changed to what this kind of job needs."""
    if job == "train":
        return cluster
    once = cluster.model_copy(update={"array": [], "chain": 1, "requeue": False})
    if job == "preflight":
        return once
    return once.model_copy(update={"nodes": 1, "gpus_per_node": "auto", "gres": None, "exclusive": False})


def home_of_scripts() -> Path:
    """The folder that holds `launch/` and `slurm/`: the checkout, or where they were installed."""
    return next((root for root in (CHECKOUT, INSTALLED) if (root / "slurm" / "train.sbatch").is_file()), CHECKOUT)


def write_files(recipe: Recipe, submission: str) -> None:
    """Everything the job reads, for each member. Raises StorageError."""
    runs = members(recipe)
    try:
        for name, member in runs.items():
            _write(slurm_dir(Path(recipe.run.dir) / name), files_of(member, submission))
        if recipe.cluster.array:
            names = "".join(f"{name}\n" for name in runs)
            _write(slurm_dir(Path(recipe.run.dir)), {ARRAY: names, **files_of(recipe, submission)})
        else:
            (slurm_dir(Path(recipe.run.dir)) / ARRAY).unlink(missing_ok=True)  # of an earlier submission
    except OSError as error:
        raise StorageError(f"run.dir={recipe.run.dir}: cannot be written ({error.strerror}): choose another") from error


def _write(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)
