"""A group of workers over several hosts: one is killed, another cut off, and the run goes on with what is left."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import hosts

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not hosts.can_be_made(), reason="this machine makes no network namespaces: it takes root and ip"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[hosts.RayOnHosts]:
    """A head and two hosts with room for one worker each."""
    with tempfile.TemporaryDirectory(prefix="h-", dir="/tmp") as place, hosts.Hosts(3) as made:
        ray = hosts.RayOnHosts(made, Path(place) / "ray", {2: 1, 3: 1})
        yield ray
        ray.close()


@pytest.mark.capability(
    "Several hosts: one killed, one cut off; an elastic group goes on with what is left and grows back"
)
def test_a_group_goes_on_without_a_host_and_grows_back(cluster, new_project, tmp_path):
    project = new_project(tmp_path, provider="ray", address=cluster.address)
    project.stage |= {"steps": 30000, "checkpoint": {"every": 10}}
    project.manifest["compute"]["pools"]["train"]["workers"] = {"min": 1, "max": 2}
    project.manifest["compute"]["supervision"] = {"silence_seconds": 30}
    project.called("shaken")

    def formed() -> list[int]:
        return [event["workers"] for event in project.told("group_formed")]

    def lost(number: int) -> dict:
        return project.until(lambda: project.told("worker_failure")[number - 1 : number])[0]

    project.start(on=cluster)
    project.until(lambda: project.step() > 20)
    assert formed() == [2]

    cluster.hosts.kill(3)
    assert lost(1)["what"] == "node"
    project.until(lambda: formed() == [2, 1])
    begin = project.step()
    project.until(lambda: project.step() > begin + 20)
    cluster.join(3)
    project.until(lambda: formed() == [2, 1, 2])

    begin = project.step()
    project.until(lambda: project.step() > begin + 20)
    cluster.hosts.cut(2)
    assert lost(2)["what"] == "node"
    project.until(lambda: formed() == [2, 1, 2, 1])
    begin = project.step()
    project.until(lambda: project.step() > begin + 20)
    cluster.hosts.heal(2)
    cluster.hosts.kill(2)
    cluster.join(2)
    project.until(lambda: formed() == [2, 1, 2, 1, 2])
    project.kill()

    shaken = project.lines()
    calm = project.called("calm")
    calm.manifest["compute"] = {"pools": {"train": {"workers": 1}}}
    calm.start()
    calm.until(lambda: calm.step() >= len(shaken))
    calm.kill()
    order = ("step", "epoch", "tokens", "trained_tokens", "documents", "lr")
    for ours, theirs in zip(shaken, calm.lines(), strict=False):
        assert {key: ours[key] for key in order} == {key: theirs[key] for key in order}
    for ours, theirs in zip(shaken[:40], calm.lines(), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
