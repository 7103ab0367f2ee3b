"""Bad nodes are named for what is wrong with them, and good ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sft_dist import preflight
from sft_dist.config.loader import load_recipe
from sft_dist.gpu_health import gpu_faults
from sft_dist.launch.nodes import Nodes
from sft_dist.node_facts import Complaint, Facts, compare, to_leave_out
from sft_dist.node_network import Measured, pairings
from sft_dist.preflight import space_faults

NAMES = ["n1", "n2", "n3"]


def facts(node: int, **changes: object) -> Facts:
    same = {"torch": "2.13.0", "view of data.json": "1 files, 10 bytes"} | changes.pop("same", {})  # type: ignore[operator]
    return Facts(node, NAMES[node], same, **changes)  # type: ignore[arg-type]


def complaints(*told: Facts | None) -> list[tuple[str, str]]:
    return [(complaint.name, complaint.what) for complaint in compare(told, NAMES)]


def test_equal_nodes_are_fine() -> None:
    assert complaints(facts(0), facts(1), facts(2)) == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"same": {"torch": "2.11.0"}}, "torch is 2.11.0, on the others 2.13.0"),
        ({"same": {"view of data.json": "absent"}}, "view of data.json is absent"),
        ({"clock_seconds": 7.0}, r"clock is +7.0 s off"),
        ({"faults": ["GPU 3 (H100): 2 uncorrected memory errors: reset or replace it"]}, "GPU 3"),
        ({"gpu_teraflops": [700.0, 150.0]}, "GPU 1 does 150 teraflops, the others 700"),
        ({"unreachable": "cannot reach n1 port 9"}, "cannot reach n1"),
        ({"failed_sum": "3 of 9 sums are wrong"}, "all-reduce: 3 of 9 sums"),
        ({"link_gigabytes_per_second": 3.0}, "its link does 3,000.0 MB/s, others 12,000.0"),
    ],
)
def test_the_odd_node_is_named(odd: dict[str, object], said: str) -> None:
    usual = {"gpu_teraflops": [710.0, 700.0], "link_gigabytes_per_second": 12.0}
    base = {key: value for key, value in usual.items() if key in odd}
    ((name, what),) = complaints(facts(0, **base), facts(1, **odd), facts(2, **base))
    assert name == "n2" and said in what


def test_the_driver_is_believed_when_it_names_a_fault() -> None:
    card = {"index": "3", "name": "H100", "ecc": "0", "hw_slowdown": "Not Active", "too_hot": "Not Active"}
    assert gpu_faults(card) == gpu_faults(card | {"ecc": "[N/A]"}) == []
    for change, said in (
        ({"ecc": "2"}, "2 uncorrected"),
        ({"hw_slowdown": "Active"}, "power"),
        ({"too_hot": "Active"}, "hot"),
    ):
        (fault,) = gpu_faults(card | change)
        assert fault.startswith("GPU 3 (H100): ") and said in fault


def test_a_silent_node_is_named_and_what_follows_from_it_is_not() -> None:
    failed = {"failed_sum": "timed out"}
    ((name, what),) = complaints(facts(0, **failed), None, facts(2, **failed))
    assert name == "n2" and "said nothing" in what


def test_a_link_that_fails_is_not_its_nodes_fault_where_another_is_bad() -> None:
    """The partner of a node that dies in the test of links fails as well."""
    lost = {"failed_link": "connection closed by peer", "gigabytes_per_second": 1.0}
    assert [name for name, _ in complaints(facts(0), None, facts(2, **lost))] == ["n2"]
    assert [name for name, _ in complaints(facts(0), facts(1, faults=["GPU 3"]), facts(2, **lost))] == ["n2"]
    assert [name for name, _ in complaints(facts(0), facts(1, failed_sum="x"), facts(2, **lost))] == ["n2"]
    ((name, what),) = complaints(facts(0), facts(1), facts(2, **lost))
    assert name == "n3" and what == "its link to another node: connection closed by peer"
    assert [name for name, _ in complaints(*(facts(node, **lost) for node in range(3)))] == ["n3"]


def test_a_partner_that_dies_in_the_test_of_links_leaves_the_sums_right() -> None:
    """One process is all there is here: the reduction comes about, and the link raises."""
    done = subprocess.run(
        [sys.executable, "-c", "from sft_dist import node_network as n; from sft_dist.launch.nodes import Nodes\n"
         "def link_rate(*_): raise RuntimeError('closed by peer\\nmore')\n"
         "n.link_rate = link_rate\n"
         "found = n.measure(Nodes(1, 0, '127.0.0.1', 29379, 'm'))\n"
         "print(found.fault, found.link, found.link_fault, found.all_reduce > 0)"],
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout == "None None closed by peer True\n", done.stderr


def test_the_first_node_waits_for_those_whose_partners_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[str, float]] = []
    recipe = load_recipe([], ["model.path=gpt2", "data.sources=[{path: x.json}]", f"run.dir={tmp_path}"])
    first = Nodes(2, 0, "n", 1, "m")

    def collect(meeting: Path, count: int, kind: str, seconds: float) -> list[Facts | None]:
        waits.append((kind, seconds))
        return [facts(0), facts(1)]

    monkeypatch.setattr(preflight, "collect", collect)
    monkeypatch.setattr(preflight, "reach", lambda nodes: None)
    monkeypatch.setattr(preflight, "measure", lambda nodes: Measured(1.0, link_fault="timed out"))
    preflight.check_nodes(recipe, first, NAMES[:2], lambda line: None)
    monkeypatch.setattr(preflight, "explore_network", lambda facts, *_: facts)
    preflight.check_nodes(recipe, first, NAMES[:2], lambda line: None)
    assert [seconds for kind, seconds in waits if kind == "node"] == [80.0, 20.0]


def test_when_nobody_reaches_the_first_node_it_is_the_first_that_is_bad() -> None:
    lost = {"unreachable": "cannot reach n1 port 9: no route"}
    assert [name for name, _ in complaints(facts(0), facts(1, **lost), facts(2, **lost))] == ["n1"]
    nameless = {"unreachable": "does not know the name n1: try again"}
    assert [name for name, _ in complaints(facts(0), facts(1, **nameless), facts(2, **lost))] == ["n2", "n3"]


def test_a_failure_that_nothing_explains_costs_one_node() -> None:
    failed = {"failed_sum": "3 of 9 sums are wrong"}
    assert [name for name, _ in complaints(*(facts(node, **failed) for node in range(3)))] == ["n3"]


def test_of_two_that_differ_the_first_is_right() -> None:
    told = [facts(0), facts(1, same={"torch": "2.11.0"})]
    assert [c.name for c in compare(told, NAMES[:2])] == ["n2"]
    assert isinstance(compare(told, NAMES[:2])[0], Complaint)


def test_nodes_that_are_all_bad_are_not_left_out() -> None:
    full = [Complaint(name, "no space") for name in NAMES]
    assert to_leave_out(full[:2], NAMES) == ["n1", "n2"] and to_leave_out(full, NAMES) == []
    assert to_leave_out(full[:1], NAMES[:1]) == ["n1"]  # another one may be better


@pytest.mark.parametrize("count", range(2, 12))
def test_in_each_round_partners_choose_each_other_and_no_pair_meets_twice(count: int) -> None:
    met = {node: list(pairings(node, count)) for node in range(count)}
    assert all(node in met[partner] for node, partners in met.items() for partner in partners)
    assert all(node not in partners and len(set(partners)) == len(partners) for node, partners in met.items())
    assert all(len(partners) >= min(2, count - 1) for partners in met.values())


def test_a_disk_too_small_for_a_checkpoint_is_told() -> None:
    sizes = "vocab_size: 1024, hidden_size: 512, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 8"
    llama = f"model.config={{model_type: llama, {sizes}}}"
    given = ["model.init=random", "model.tokenizer=x", llama, "data.sources=[{path: x.json}]", "tuning.method=full"]
    recipe = load_recipe([], given)
    (fault,) = space_faults(recipe, 2**20)
    assert "0.0 GiB free, a checkpoint takes" in fault and space_faults(recipe, 2**40) == []
    unknown = load_recipe([], ["model.path=somebody/new", "data.sources=[{path: x.json}]"])
    assert space_faults(unknown, 0) == []


def test_nodes_tell_each_other_through_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes as threads, on a port of this machine; the second sees other code. The reduction has its own test."""
    monkeypatch.setattr(preflight, "measure", lambda nodes: Measured(1.5, 2.0))
    versions = {threading.get_ident(): "right"}
    monkeypatch.setattr(preflight, "code_digest", lambda: versions.get(threading.get_ident(), "wrong"))
    recipe = load_recipe([], ["model.path=gpt2", "data.sources=[{path: x.json}]", f"run.dir={tmp_path}"])
    said: list[str] = []
    codes: list[int] = []
    second = Nodes(2, 1, "127.0.0.1", 29377, "m")
    other = threading.Thread(
        target=lambda: codes.append(preflight.check_nodes(recipe, second, ["a", "b"], said.append))
    )
    other.start()
    codes.append(preflight.check_nodes(recipe, Nodes(2, 0, "127.0.0.1", 29377, "m"), ["a", "b"], said.append))
    other.join(60)
    assert codes == [77, 77]
    assert (tmp_path / "logs" / "preflight-m" / "bad_nodes").read_text() == "b\n"
    assert any("sft_dist is wrong, on the others right" in line for line in said)
    assert any("2 nodes, 1 complaints, all-reduce 1,500 MB/s" in line for line in said)
