"""A submission is files and one command: every value a word of its own, or refused."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cli import main as cli
from sft_dist.config.cluster import limit_seconds
from sft_dist.config.loader import load_recipe, load_resolved
from sft_dist.config.schema import Recipe
from sft_dist.errors import ConfigError
from sft_dist.launch import ssh
from sft_dist.launch.submission import check_cluster, files_of, members, sbatch_command, srun_words, write_files

BASE = ["model.path=gpt2", "data.sources=[{path: x.json}]", "cluster.target=slurm", "run.name=job", "run.dir=runs/job"]


def recipe(*settings: str) -> Recipe:
    return load_recipe([], [*BASE, *settings])


def flags(*settings: str, **options: Any) -> list[str]:
    return [word for word in sbatch_command(recipe(*settings), **options) if word.startswith("--")]


def test_the_command_is_sorted_and_ends_with_script_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = sbatch_command(recipe("cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.time=1:00:00"))
    assert words[0] == "sbatch" and words[1:-2] == sorted(words[1:-2])
    assert words[-2].endswith("/slurm/train.sbatch") and words[-1] == f"{tmp_path}/runs/job"
    assert {"--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--signal=B:USR1@300", "--requeue"} <= set(words)
    assert f"--output={tmp_path}/runs/job/slurm/%j.out" in words and f"--chdir={tmp_path}" in words
    assert shlex.split(shlex.join(words)) == words


def test_a_named_interface_reaches_the_workers_of_slurm_and_ssh() -> None:
    named = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    given = recipe("cluster.interface=ib0")
    assert {f"{name}={value}" for name, value in named.items()} <= set(files_of(given, "one")["job.env"].splitlines())
    assert named.items() <= ssh.ssh_environment(given, {}).items()
    assert not named.keys() & ssh.ssh_environment(recipe(), {}).keys()
    for bad in ("../x", "a b", "interface-with-a-long-name"):
        with pytest.raises(ConfigError, match=r"cluster\.interface"):
            recipe(f"cluster.interface={bad}")


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ("cluster.partition=gpu", "--partition=gpu"),
        ("cluster.account=lab", "--account=lab"),
        ("cluster.qos=high", "--qos=high"),
        ("cluster.constraint=a100|h100", "--constraint=a100|h100"),
        ("cluster.exclude=n[1-3]", "--exclude=n[1-3]"),
        ("cluster.gres=gpu:h100:8", "--gres=gpu:h100:8"),
        ("cluster.dependency=afterok:12", "--dependency=afterok:12"),
        ("cluster.array=[5,9]", "--array=0-1"),
        ("cluster.requeue=false", "--no-requeue"),
        ("cluster.stop_seconds=60", "--signal=B:USR1@60"),
        ("cluster.time=5", "--signal=B:USR1@60"),  # minutes: a warning of 300 s would come at once
        ('cluster.sbatch=["--mem=0", "--reservation=x"]', "--reservation=x"),
    ],
)
def test_each_key_is_one_flag(setting: str, flag: str) -> None:
    assert flag in flags(setting) and flag not in flags()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-2:03", 93780), ("1-02:03:04", 93784)],
)
def test_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert limit_seconds(time) == seconds


def test_other_jobs_get_what_they_need() -> None:
    prepare = flags("cluster.nodes=4", "cluster.gpus_per_node=8", job="prepare")
    assert "--nodes=1" in prepare and not any(flag.startswith("--gpus") for flag in prepare)
    preflight = flags("cluster.nodes=4", "cluster.array=[1,2]", job="preflight")
    assert "--nodes=4" in preflight and "--no-requeue" in preflight and "--array=0-1" not in preflight
    assert "--dependency=afterany:12" in flags(after="12")


def test_percent_signs_of_a_folder_are_not_slurms() -> None:
    (output,) = (flag for flag in flags("run.dir=runs/50%j") if flag.startswith("--output"))
    assert output.endswith("/runs/50%%j/slurm/%j.out")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.target=local", "cluster.target=local: submit needs cluster.target=slurm"),
        ('cluster.sbatch=["--output=x"]', "--output=x: leave it out"),
        ('cluster.sbatch=["--time=1"]', "--time=1: set cluster.time instead"),
        ('run.dir="a\\\\b"', "choose another"),
        ('cluster.environment={"A B": x}', "cluster.environment.A B"),
        ('cluster.environment={A: "x\\ny"}', "a value of one line"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_cluster(recipe(setting))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        "cluster.partition=gpu --wrap=x",
        'cluster.account="a\\nb"',
        "cluster.time=tomorrow",
        'cluster.sbatch=["rm -rf /"]',
        "cluster.stop_seconds=0",
        'cluster={time: "5", stop_seconds: 300}',
        "cluster.nodes=0",
        "cluster.array=[1,1]",
        "cluster.target=ssh",
        'cluster={target: ssh, hosts: ["-oProxyCommand"]}',
        "run.name=$(touch x)",
    ],
)
def test_values_that_are_no_names_are_refused_by_the_schema(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0].replace(".", r"\.")):
        recipe(setting)


def test_an_array_has_a_recipe_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = recipe("cluster.array=[3,4]")
    assert {name: (one.run.seed, one.run.dir) for name, one in members(whole).items()} == {
        "seed-3": (3, "runs/job/seed-3"),
        "seed-4": (4, "runs/job/seed-4"),
    }
    write_files(whole, "one")
    assert Path("runs/job/slurm/array").read_text().split() == ["seed-3", "seed-4"]
    assert load_resolved("runs/job/seed-4/slurm/recipe.yaml").run.seed == 4
    caches = {load_resolved(f"runs/job/seed-{seed}/slurm/recipe.yaml").data.cache_dir for seed in (3, 4)}
    assert caches == {"runs/.sft-cache"}


def test_values_travel_as_lines_of_files_unchanged() -> None:
    hostile = "$(touch x); 'a' \"b\" \\ #"
    given = recipe("cluster.setup=[module load cuda, 'export A=\"$B\"']")
    section = given.cluster.model_copy(update={"environment": {"HOSTILE": hostile}})
    files = files_of(given.model_copy(update={"cluster": section}), "one")
    assert "HF_HUB_OFFLINE=0\n" in files_of(recipe("hub.push_to=me/model"), "one")["job.env"]
    assert f"HOSTILE={hostile}\n" in files["job.env"] and "HF_HUB_OFFLINE=1\n" in files["job.env"]
    assert files["setup.sh"] == 'module load cuda\nexport A="$B"\n'


def test_containers_become_flags_or_a_command_in_front(tmp_path: Path) -> None:
    box = "cluster.container={image: my image.sqsh, mounts: [/data:/data]}"
    words = srun_words(recipe(box).cluster, Path("/runs/a"), Path("/work"))
    assert words == [
        "--container-image=my image.sqsh",
        "--container-mounts=/data:/data,/work:/work,/runs/a:/runs/a",
        "--container-workdir=/work",
    ]
    words = srun_words(recipe(box, "cluster.container.runtime=apptainer").cluster, Path("/runs/a"), Path("/work"))
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-3:] == ["--pwd", "/work", "my image.sqsh"]
    assert files_of(recipe(box), "one")["job.env"].count("SFT_PYTHON=python3\n") == 1


def test_train_sends_a_recipe_to_where_its_cluster_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm has a verb of its own; ssh becomes launch/ssh.sh with the host file and the user's own words."""
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("[]")
    became: list[tuple[list[str], dict[str, str]]] = []

    def become(program: str, words: list[str], environ: dict[str, str]) -> None:
        became.append((words, environ))
        sys.exit(0)  # the real one does not return either

    monkeypatch.setattr(ssh.os, "execvpe", become)
    Path("r.yaml").write_text("model: {path: gpt2}\ndata: {sources: [{path: x.json}]}\n")
    assert cli.main(["train", "r.yaml", "cluster.target=slurm"]) == 2
    assert "hand it over with sft-dist submit" in capsys.readouterr().err
    there = ["cluster={target: ssh, hosts: [n1, me@n2], processes_per_node: 4, environment: {A: x y}}"]
    assert cli.main(["train", "r.yaml", *there, "--nproc", "2"]) == 2
    assert cli.main(["train", "r.yaml", *there, "cluster.setup=[module load x]"]) == 2
    assert not became
    with pytest.raises(SystemExit):
        cli.main(["train", "r.yaml", *there])
    ((words, environ),) = became
    assert words[1].endswith("launch/ssh.sh") and words[3:] == ["r.yaml", *there]
    assert Path(words[2]).read_text() == "n1\nme@n2\n"
    assert (environ["SFT_NPROC"], environ["SFT_PASS"], environ["A"], environ["SFT_PREFLIGHT"]) == ("4", "A", "x y", "1")


@pytest.mark.parametrize("action", ["status", "logs", "cancel", "requeue"])
def test_a_folder_that_was_not_submitted_is_told_in_one_line(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["slurm", action, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and ("was not submitted" in said or "nothing was written there yet" in said)
