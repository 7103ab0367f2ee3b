"""`cluster.target: ssh`: the words and variables with which launch/ssh.sh starts the run on `cluster.hosts`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError, StorageError
from sft_dist.launch.submission import home_of_scripts, network_variables, processes_per_node

HOSTS = "hosts"  # below RUN_DIR/logs


def ssh_command(recipe: Recipe, arguments: Sequence[str]) -> list[str]:
    """launch/ssh.sh with the host file and the recipe's files and settings as the user gave them."""
    return ["bash", str(home_of_scripts() / "launch" / "ssh.sh"), str(hosts_path(recipe)), *arguments]


def ssh_environment(recipe: Recipe, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with what the section asks for; what is set already wins, as it does in launch/worker.sh."""
    cluster = recipe.cluster
    wanted = {
        **network_variables(cluster),
        "SFT_LAUNCHER": cluster.launcher,
        "SFT_PASS": " ".join(cluster.environment),
        "SFT_PREFLIGHT": str(int(cluster.preflight)),
        "SFT_PYTHON": sys.executable,
        **cluster.environment,
    }
    if (count := processes_per_node(cluster)) is not None:
        wanted["SFT_NPROC"] = str(count)
    return wanted | dict(environ)


def hosts_path(recipe: Recipe) -> Path:
    """Where the host file goes."""
    return Path(recipe.run.dir) / "logs" / HOSTS


def run_over_ssh(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Become launch/ssh.sh; does not return. Raises ConfigError for keys that ssh cannot honour."""
    if recipe.cluster.setup or recipe.cluster.container.image:
        raise ConfigError(
            "cluster.setup and cluster.container are for Slurm: with ssh, prepare the machines themselves"
        )
    path = hosts_path(recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{host}\n" for host in recipe.cluster.hosts))
    except OSError as error:
        raise StorageError(f"run.dir={recipe.run.dir}: cannot be written ({error.strerror}): choose another") from error
    os.execvpe("bash", ssh_command(recipe, arguments), ssh_environment(recipe, os.environ))
