"""A group of workers is called as one: all ranks, some or one, with results in rank order."""

from __future__ import annotations

import os

import numpy as np
import pytest

from postlude.cluster import placement
from postlude.cluster.bandwidth import check_bandwidth, measured_bandwidth
from postlude.cluster.failure import Failure, Kind
from postlude.cluster.group import WorkerGroup
from postlude.cluster.placement import Demand
from postlude.cluster.provider import open_cluster
from postlude.cluster.topology import check_topology
from postlude.cluster.worker import Setting
from postlude.errors import ComputeError, DataError
from postlude.manifest.compute import Compute, Pool


class Counter:
    """What each rank holds in these tests."""

    def __init__(self, start: int) -> None:
        self.count = start + int(os.environ["RANK"])

    def add(self, numbers: np.ndarray) -> tuple[int, float]:
        self.count += 1
        return self.count, float(numbers.sum())

    def writable(self, numbers: np.ndarray) -> bool:
        return numbers.flags.writeable

    def place(self) -> dict[str, str]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "OF_MY_OWN")
        return {name: os.environ[name] for name in names} | {"folder": os.getcwd()}

    def fail(self, on: int, how: str) -> None:
        if int(os.environ["RANK"]) == on:
            if how == "dies":
                os._exit(3)
            raise DataError("a bad record") if how == "user" else ValueError("of its own")


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
    setting = Setting.here("test", 1, {"OF_MY_OWN": "yes"})
    with WorkerGroup("test", demand, held, 2, setting, cluster.interface) as made:
        made.build("cluster.test_group:Counter", 10)
        yield made


def test_calls_go_to_all_some_or_one_and_come_back_in_order(group):
    numbers = np.ones(3)
    assert group.call("add", numbers) == [(11, 3.0), (12, 3.0)]
    assert group.call("add", numbers, ranks=[1]) == [(13, 3.0)]
    assert group.call("add", numbers, ranks=[1, 0]) == [(14, 3.0), (12, 3.0)]


def test_a_large_array_is_shared_not_copied_to_each(group):
    """What comes out of the object store is read-only: all ranks of a node see the one."""
    assert group.call("writable", np.zeros(2**20)) == [False, False]


def test_a_worker_knows_its_place(group):
    for rank, place in enumerate(group.call("place")):
        assert place["RANK"] == place["LOCAL_RANK"] == str(rank)
        assert (place["WORLD_SIZE"], place["OMP_NUM_THREADS"], place["OF_MY_OWN"]) == ("2", "1", "yes")
        assert place["folder"] == os.getcwd()


def test_what_a_rank_raises_comes_with_its_rank_and_traceback(group):
    with pytest.raises(Failure, match="of its own") as raised:
        group.call("fail", 1, "program")
    assert (raised.value.kind, raised.value.rank) == (Kind.PROGRAM, 1)
    assert "test_group.py" in raised.value.trace
    with pytest.raises(Failure, match="a bad record") as raised:
        group.call("fail", 0, "user")
    assert isinstance(raised.value.error, DataError)


def test_a_group_of_the_same_name_takes_the_place_of_one_that_was_left_behind(cluster):
    demand = Demand.of(Compute(), Pool())
    setting = Setting.here("test", 1, {})
    first = WorkerGroup("twice", demand, placement.place(demand, 1, 30.0, lambda: False), 1, setting, "lo")
    with WorkerGroup("twice", demand, placement.place(demand, 1, 30.0, lambda: False), 1, setting, "lo") as second:
        second.build("cluster.test_group:Counter", 1)
        assert second.call("add", np.ones(1)) == [(2, 1.0)]
        with pytest.raises(Failure) as raised:
            first.build("cluster.test_group:Counter", 1)
        assert raised.value.kind is Kind.PROCESS
    first.close()


def test_a_rank_that_dies_in_a_call_is_a_failure_of_its_process(cluster):
    demand = Demand.of(Compute(), Pool())
    held = placement.place(demand, 1, 30.0, lambda: False)
    with WorkerGroup("dies", demand, held, 1, Setting.here("test", 1, {}), "lo") as group:
        group.build("cluster.test_group:Counter", 1)
        with pytest.raises(Failure) as raised:
            group.call("fail", 0, "dies")
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
    ((source, target, measured),) = measured_bandwidth(Demand.of(Compute(), Pool()), 2)
    assert source == target  # both workers are on this machine
    assert measured > 0.1
    check_bandwidth(Compute(pools={"train": Pool(workers=2, bandwidth_gbit=0.01)}))
    with pytest.raises(
        ComputeError, match=r"bandwidth_gbit is 1e\+06, and from .* gigabits a second were measured"
    ) as raised:
        check_bandwidth(Compute(pools={"train": Pool(workers=2, bandwidth_gbit=1e6)}))
    assert raised.value.exit_code == 4
