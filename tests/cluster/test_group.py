"""A group of workers is called as one, with results in rank order."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from postlude.cluster import placement
from postlude.cluster.bandwidth import check_bandwidth, measure_bandwidth
from postlude.cluster.failure import Failure, Kind
from postlude.cluster.group import WorkerGroup
from postlude.cluster.placement import Demand, check_topology
from postlude.cluster.providers.base import open_cluster
from postlude.cluster.standstill import Standstill
from postlude.cluster.watch import Observer, Watch
from postlude.cluster.worker import WorkerSetup
from postlude.errors import ComputeError, DataError
from postlude.manifest.compute import Compute, Pool, Supervision
from postlude.storage import Journal
from postlude.telemetry.relay import Relay
from postlude.training.interruption import Interruption


def account(numbers: np.ndarray, stop: Interruption, display: Relay) -> dict[str, Any]:
    """What each rank tells in these tests."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "OF_MY_OWN", "GOMP_SPINCOUNT")
    place = {name: os.environ.get(name) for name in names} | {"folder": os.getcwd()}
    return place | {"sum": float(numbers.sum()), "writable": numbers.flags.writeable}


def fail(how: tuple[int, str], stop: Interruption, display: Relay) -> None:
    on, what = how
    if int(os.environ["RANK"]) == on:
        if what == "dies":
            os._exit(3)
        raise DataError("a bad record") if what == "user" else ValueError("of its own")


def watched(group: WorkerGroup, function: Callable[..., Any], task: Any) -> list[Any]:
    """What every rank returns."""
    name = f"cluster.test_group:{function.__name__}"
    observer = Observer(Journal("memory://readings.jsonl"), print, seconds=60.0)
    return Watch(group, Supervision(), lambda look: None, observer, Standstill()).until_over(name, task, lambda: None)


@pytest.fixture(scope="module")
def cluster():
    compute = Compute(pools={"train": Pool(workers=2)})
    with open_cluster(compute) as opened:
        yield opened


@pytest.fixture(scope="module")
def group(cluster):
    compute, pool = Compute(), Pool(workers=2)
    demand = Demand.of(compute, pool)
    held = placement.place(demand, 2, 30.0, lambda: False)
    setup = WorkerSetup("test", 1, {"OF_MY_OWN": "yes", "GOMP_SPINCOUNT": "7"})
    with WorkerGroup("test", demand, held, 2, setup, cluster.interface) as made:
        yield made


def test_every_rank_is_called_and_what_they_return_comes_in_their_order(group):
    for _ in range(2):
        results = watched(group, account, np.ones(3))
        assert [result["RANK"] for result in results] == ["0", "1"]
        assert [result["sum"] for result in results] == [3.0, 3.0]


def test_a_large_task_is_shared_not_copied_to_each(group):
    """What comes out of the object store is read-only: all ranks of a node see the one."""
    assert not any(result["writable"] for result in watched(group, account, np.zeros(2**20)))


def test_a_worker_knows_its_place(group):
    for rank, place in enumerate(watched(group, account, np.ones(1))):
        assert place["RANK"] == place["LOCAL_RANK"] == str(rank)
        assert (place["WORLD_SIZE"], place["OMP_NUM_THREADS"], place["OF_MY_OWN"]) == ("2", "1", "yes")
        assert place["GOMP_SPINCOUNT"] == "7", "what the user sets stays"
        assert place["folder"] == os.getcwd()


def test_what_a_rank_raises_comes_with_its_rank_and_traceback(group):
    with pytest.raises(Failure, match="of its own") as raised:
        watched(group, fail, (1, "program"))
    assert (raised.value.kind, raised.value.rank) == (Kind.PROGRAM, 1)
    assert "test_group.py" in raised.value.trace
    with pytest.raises(Failure, match="a bad record") as raised:
        watched(group, fail, (0, "user"))
    assert isinstance(raised.value.error, DataError)


def test_a_group_of_the_same_name_takes_the_place_of_one_that_was_left_behind(cluster):
    demand = Demand.of(Compute(), Pool())
    setup = WorkerSetup("test", 1, {})
    first = WorkerGroup("twice", demand, placement.place(demand, 1, 30.0, lambda: False), 1, setup, "lo")
    with WorkerGroup("twice", demand, placement.place(demand, 1, 30.0, lambda: False), 1, setup, "lo") as second:
        [place] = watched(second, account, np.ones(1))
        assert place["sum"] == 1.0
        with pytest.raises(Failure) as raised:
            watched(first, account, np.ones(1))
        assert raised.value.kind is Kind.PROCESS
    first.close()


def test_a_rank_that_dies_at_work_is_a_failure_of_its_process(cluster):
    demand = Demand.of(Compute(), Pool())
    held = placement.place(demand, 1, 30.0, lambda: False)
    with WorkerGroup("dies", demand, held, 1, WorkerSetup("test", 1, {}), "lo") as group:
        with pytest.raises(Failure) as raised:
            watched(group, fail, (0, "dies"))
        assert raised.value.kind is Kind.PROCESS


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (Pool(workers=2, gpus_per_worker=1), "1 GPU"),
        (Pool(workers=2, memory_per_worker=2**50), "memory"),
        (Pool(workers=2, labels={"rack": "seven"}), "label rack=seven"),
        (Pool(workers=2, placement="node_each"), "node_each"),
    ],
)
def test_a_pool_that_finds_no_room_is_refused_with_what_is_there(cluster, pool, said):
    with pytest.raises(ComputeError, match=said) as raised:
        check_topology(Compute(pools={"train": pool}))
    assert raised.value.exit_code == 4
    assert "GiB of memory" in str(raised.value)


def test_a_network_that_is_too_slow_is_refused_with_what_was_measured(cluster):
    ((source, target, measured),) = measure_bandwidth(Demand.of(Compute(), Pool()), 2)
    assert source == target  # both workers are on this machine
    assert measured > 0.1
    check_bandwidth(Compute(pools={"train": Pool(workers=2, bandwidth_gbit=0.01)}))
    with pytest.raises(
        ComputeError, match=r"bandwidth_gbit is 1e\+06, and from .* gigabits a second were measured"
    ) as raised:
        check_bandwidth(Compute(pools={"train": Pool(workers=2, bandwidth_gbit=1e6)}))
    assert raised.value.exit_code == 4
