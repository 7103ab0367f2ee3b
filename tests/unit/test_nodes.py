"""A run's place among several machines: what launchers and srun say of it, and how nodes agree on the attempt."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sft_dist.config.srun import adopt_srun, first_node, place_of_task, port_of, tasks_per_node
from sft_dist.errors import ConfigError, StorageError
from sft_dist.launch.job import Job
from sft_dist.launch.nodes import ALONE, Nodes, hosting, join, read_nodes

SECOND = {"SFT_NNODES": "2", "SFT_NODE_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500", "SFT_MEETING": "7.0"}
TASK = {
    "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "5", "SLURM_JOB_ID": "12",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu7", "SLURM_STEP_ID": "0",
}  # fmt: skip


def test_the_place_is_read_from_the_environment() -> None:
    assert read_nodes({}) is ALONE and read_nodes({"SFT_NNODES": "1", "MASTER_ADDR": "x"}) is ALONE
    assert read_nodes(SECOND) == Nodes(2, 1, "n1", 29500, "7.0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SFT_NODE_RANK": "2"}, "SFT_NODE_RANK=2 of SFT_NNODES=2"),
        ({"SFT_NNODES": "two"}, "SFT_NNODES=two"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"SFT_MEETING": ""}, "SFT_MEETING"),
        ({"SFT_MEETING": "../x"}, r"SFT_MEETING=\.\./x"),
        ({"SFT_RUN_SECRET": "short"}, "SFT_RUN_SECRET: must be 32 to 128 hexadecimal digits"),
    ],
)
def test_an_incomplete_place_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_nodes(SECOND | changes)


def test_the_other_nodes_learn_the_attempt_from_the_first(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    nodes = read_nodes(SECOND)
    joined: list[int] = []
    other = threading.Thread(target=lambda: joined.append(join(tmp_path, nodes, 4)))
    other.start()
    with hosting(tmp_path, nodes, 4, attempt=3):
        other.join(30)
        with pytest.raises(ConfigError, match="would start 2 processes, the first node 4"):
            join(tmp_path, nodes, 2)
        stranger = read_nodes(SECOND | {"SFT_RUN_SECRET": "0" * 32})
        with pytest.raises(ConfigError, match="SFT_RUN_SECRET of node 1 is not the first node's"):
            join(tmp_path, stranger, 4)
        assert "0" * 32 not in repr(stranger)
    assert joined == [3]
    with pytest.raises(StorageError, match=r"node 1: .*did not appear within 0 s"):
        join(tmp_path, nodes, 4, seconds=0.1)


def test_ranks_go_on_from_node_to_node(tmp_path: Path) -> None:
    job = Job(("x",), 4, tmp_path, 1, read_nodes(SECOND))
    found = job.environment(3, {"RANK": "9", "KEPT": "yes"})
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("7", "3", "8", "4")
    assert (found["SFT_RENDEZVOUS"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("env://", "n1", "29500")
    assert found["KEPT"] == "yes"
    alone = Job(("x",), 4, tmp_path, 1).environment(3, {})
    assert alone["SFT_RENDEZVOUS"].startswith("file:///") and "MASTER_ADDR" not in alone


def test_a_task_of_srun_is_a_rank() -> None:
    environ = dict(TASK)
    adopt_srun(environ)
    expected = {
        "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "gpu7",
    }  # fmt: skip
    assert environ | expected == environ
    assert 20000 <= int(environ["MASTER_PORT"]) < 30000
    untouched = TASK | {"RANK": "0"}
    adopt_srun(untouched)
    assert untouched == TASK | {"RANK": "0"}
    assert place_of_task(TASK | {"MASTER_ADDR": "x", "MASTER_PORT": "1"})["MASTER_ADDR"] == "x"


def test_steps_of_one_job_get_ports_of_their_own() -> None:
    assert len({port_of({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": str(step)}) for step in range(7)}) == 7


def test_lists_of_slurm_are_expanded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE=2x3"):
        tasks_per_node("2x3")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="scontrol is not in PATH"):
        first_node("gpu[1-2]")
