"""Chaos: whatever is killed, the run goes on to its end, and its numbers are those of an undisturbed one, bit for bit.

A cluster of several nodes stands on this machine; a run has two workers on it. Killed are a rank, all ranks, the Ray of
a node that has a rank, a rank while a checkpoint is written, and the controller, each at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from cluster.test_engines import asking, below, told

pytestmark = pytest.mark.long

STEPS, EVERY = 300, 10
NODES, MORE = 3, 2


class Nodes:
    """A head without room for workers, and three nodes with room for one each: one more than the run needs."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self._small})
        self._nodes: list = []
        self.fill()

    _small = {"object_store_memory": 80 * 2**20}

    def _add(self):
        return self._cluster.add_node(num_cpus=1, wait=True, **self._small)

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def raylets(self) -> list[int]:
        """The processes of Ray that have the ranks below them."""
        return [node.all_processes["raylet"][0].process.pid for node in self._nodes]

    def lose(self, raylet: int, replaced: bool = True) -> None:
        """Kill the Ray of a node; another node takes its place in the cluster, or none until :meth:`fill`."""
        lost = self._nodes.pop(self.raylets.index(raylet))
        os.kill(raylet, signal.SIGKILL)
        if replaced:
            self.fill()
        self._cluster.remove_node(lost, allow_graceful=False)

    def fill(self) -> None:
        """Have as many nodes as at first."""
        while len(self._nodes) < NODES:
            self._nodes.append(self._add())

    def drain(self, raylet: int, seconds: int) -> None:
        """Say that a node goes away, as a provider does beforehand; another one comes."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

        leaving = self._nodes.pop(self.raylets.index(raylet))
        deadline = time.time_ns() // 10**6 + 1000 * seconds
        client = GcsClient(address=self.address)
        client.drain_node(leaving.node_id, DRAIN_NODE_REASON_PREEMPTION, "the price went up", deadline)
        self._nodes.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes():
    """The cluster, for processes that are not this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        for name, value in (("period_ms", "1000"), ("timeout_ms", "10000"), ("failure_threshold", "3")):
            patch.setenv(f"RAY_health_check_{name}", value)
        made = Nodes()
        yield made
        made.close()


@pytest.mark.capability("Chaos: ranks, nodes and the controller are killed, and the run ends bitwise undisturbed")
def test_whatever_is_killed_the_run_goes_on_and_ends_as_if_undisturbed(nodes, tmp_path, new_project, capsys):
    project = new_project(tmp_path, provider="ray", address=nodes.address)
    project.stage |= {"steps": STEPS, "checkpoint": {"every": EVERY}}
    calm = project.called("calm").finished()
    assert len(calm) == STEPS
    project.called("shaken")
    rng, survived = random.Random(0), Counter()

    def ranks() -> list[psutil.Process]:
        """Those of the group that is at work: while there are more, some of the one before are still ending."""
        found = project.ranks(nodes.raylets)
        return found if len(found) == 2 else []

    def a_rank() -> None:
        rng.choice(project.until(ranks)).kill()

    def every_rank() -> None:
        for one in project.until(ranks):
            one.kill()

    def a_node() -> None:
        rank = rng.choice(project.until(ranks))
        nodes.lose(next(pid for pid in nodes.raylets if rank in psutil.Process(pid).children(recursive=True)))

    def a_rank_in_a_checkpoint() -> None:
        folder = Path(project.run.stage("sft").uri) / "checkpoints"
        victims = project.until(ranks)
        project.until(lambda: any(not (one / "COMMITTED").exists() for one in folder.iterdir()))
        rng.choice(victims).kill()

    def the_controller() -> None:
        os.kill(project.process.pid, signal.SIGKILL)
        project.process.communicate()
        project.start()

    faults = [a_rank, every_rank, a_node, a_rank_in_a_checkpoint, the_controller]
    faults += rng.choices(faults, k=MORE)
    project.start()
    try:
        for number, fault in enumerate(faults):
            least = 5 + number * (STEPS - 60) // len(faults) + rng.randrange(20)
            project.until(lambda least=least: project.step() >= least)
            time.sleep(rng.random() * 0.1)
            before = len(project.told("group_formed"))
            fault()
            survived[fault.__name__] += 1
            project.until(lambda before=before: len(project.told("group_formed")) > before)
        project.ended()
    finally:
        project.kill()
    with capsys.disabled():
        print("\nsurvived: " + ", ".join(f"{name.replace('_', ' ')} {count} times" for name, count in survived.items()))
    assert len(project.told("recovery")) >= 4
    assert {failure["what"] for failure in project.told("worker_failure")} >= {"process", "node"}
    assert project.lines() == calm


@pytest.mark.capability("A node that its provider takes back is left with a checkpoint")
def test_a_node_that_goes_away_is_left_without_losing_a_step(nodes, tmp_path, new_project):
    project = new_project(tmp_path, provider="ray", address=nodes.address)
    project.stage |= {"steps": 200, "checkpoint": {"every": 1000}}
    calm = project.called("calm").finished()
    project.called("moved").start()
    project.until(lambda: project.step() > 20)
    rank = project.ranks(nodes.raylets)[0]
    going = next(pid for pid in nodes.raylets if rank in psutil.Process(pid).children(recursive=True))
    nodes.drain(going, 20)
    project.ended()
    (failure,) = project.told("worker_failure")
    assert failure["what"] == "preemption"
    assert project.told("stage_started")[-1]["from_step"] == project.told("checkpoint_saved")[0]["step"] < 200
    assert project.lines() == calm


@pytest.mark.capability("Engines on other nodes: where one is lost another starts, or its prompts go elsewhere")
def test_engines_on_other_nodes_are_given_the_weights_and_may_be_lost(nodes, tmp_path, new_project):
    def begun(name: str):
        project = asking(new_project(tmp_path, provider="ray", address=nodes.address)).called(name)
        project.manifest["compute"]["pools"]["train"] = {"workers": 1}
        project.stage["steps"] = 12
        project.start()
        return project

    undisturbed = begun("calm")
    undisturbed.ended()
    calm = told(undisturbed)
    for name, replaced in (("replaced", True), ("elsewhere", False)):
        project = begun(name)
        try:
            project.until(lambda: project.step() > 3)  # noqa: B023
            engine = next(iter(below(project, nodes.raylets, "ray::EngineHost").values()))
            raylet = next(pid for pid in nodes.raylets if engine in psutil.Process(pid).children(recursive=True))
            nodes.lose(raylet, replaced)
            project.ended()
        finally:
            project.kill()
            nodes.fill()
        assert len(project.told("group_formed")) == 1
        assert project.told("engine_died")
        assert told(project) == calm


def test_code_is_sent_to_nodes_that_have_another_disk(nodes, tmp_path):
    import ray

    from postlude.cluster import placement
    from postlude.cluster.group import WorkerGroup
    from postlude.cluster.placement import Demand
    from postlude.cluster.providers.base import open_cluster
    from postlude.cluster.worker import WorkerSetup
    from postlude.manifest.compute import Compute, Pool

    package = tmp_path / "sent_package"
    package.mkdir()
    (package / "__init__.py").write_text("def place(task, stop, display):\n    return __file__\n")
    compute = Compute(provider="ray", address=nodes.address, code=[str(package)])
    demand = Demand.of(compute, Pool())
    with open_cluster(compute) as cluster:
        held = placement.place(demand, 1, 60.0, lambda: False)
        setup = WorkerSetup("sent", 1, {}, folder="/", path=[])
        with WorkerGroup("sent", demand, held, 1, setup, cluster.interface) as group:
            (outcome,) = ray.get(group.work("sent_package:place", None, lease_seconds=60.0))
    place = outcome.value
    assert not place.startswith(str(tmp_path))
