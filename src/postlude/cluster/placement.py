"""Where the workers of a pool go: what each asks of a node, how many find room, and the group of places they hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from postlude.errors import ComputeError
from postlude.manifest.compute import Compute, Pool

STRATEGIES = {"pack": "PACK", "spread": "SPREAD", "one_node": "STRICT_PACK", "node_each": "STRICT_SPREAD"}
"""Ray's names for ``compute.pools.NAME.placement``."""

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Demand:
    """What each worker of a pool asks of its node."""

    resources: Mapping[str, float]
    """By Ray's names: CPU, GPU, memory (bytes), and the user's own."""
    labels: Mapping[str, str]
    """That its node has to have."""
    placement: str

    @staticmethod
    def of(compute: Compute, pool: Pool) -> Demand:
        """What the manifest asks for a pool. On this machine as many workers are started as it says, however few cores
        they share; elsewhere each reserves one where it does not say how many."""
        cpus = pool.cpus_per_worker or (1.0 if compute.provider.is_remote else 0.001)
        resources: dict[str, float] = {"CPU": cpus}
        if pool.gpus_per_worker:
            resources["GPU"] = pool.gpus_per_worker
        if pool.memory_per_worker:
            resources["memory"] = float(pool.memory_per_worker)
        return Demand(resources, pool.labels, pool.placement)

    def __str__(self) -> str:
        demands = [f"{amount:g} {name}" for name, amount in self.resources.items() if amount]
        demands += [f"label {name}={value}" for name, value in self.labels.items()]
        return ", ".join(demands) + (
            f", placed '{self.placement}'" if self.placement.endswith(("node", "each")) else ""
        )

    def fits(self, nodes: Sequence[Mapping[str, Any]], free: Callable[[Mapping[str, Any]], Mapping[str, float]]) -> int:
        """How many workers find room on the nodes, of whose resources ``free`` tells what may be taken."""
        counts = []
        for node in nodes:
            if any(node.get("Labels", {}).get(name) != value for name, value in self.labels.items()):
                continue
            has = free(node)
            amounts = {name: amount for name, amount in self.resources.items() if amount}
            counts.append(
                min((int(has.get(name, 0.0) / amount + 1e-9) for name, amount in amounts.items()), default=64)
            )
        if self.placement == "one_node":
            return max(counts, default=0)
        return sum(min(count, 1) for count in counts) if self.placement == "node_each" else sum(counts)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def is_alive(node: str) -> bool:
    """Whether the node of this id is alive."""
    return any(each["NodeID"] == node for each in nodes())


def describe_nodes() -> str:
    """What the nodes of the cluster have, in words."""
    descriptions = []
    for node in nodes():
        has = node["Resources"]
        memory = f", {has.get('memory', 0) / 2**30:.1f} GiB of memory"
        labels = {name: value for name, value in node.get("Labels", {}).items() if not name.startswith("ray.io/")}
        shown = f", labels {labels}" if labels else ""
        descriptions.append(
            f"{node['NodeManagerAddress']}: {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU{memory}{shown}"
        )
    return "; ".join(descriptions) or "no nodes"


def staying() -> list[dict[str, Any]]:
    """The nodes that are alive and of which nobody has said that they go away."""
    going = leaving()
    return [node for node in nodes() if node["NodeID"] not in going]


def room(demand: Demand) -> int:
    """For how many workers more there is room at this moment."""
    available = ray._private.state.available_resources_per_node()
    return demand.fits(staying(), lambda node: available.get(node["NodeID"], {}))


def leaving() -> set[str]:
    """Ids of the nodes of which the provider has said that they go away."""
    return set(ray._private.state.state.get_draining_nodes())


def capacity(demand: Demand) -> int:
    """For how many there would be room if nothing else ran."""
    return demand.fits(staying(), lambda node: node["Resources"])


def check_topology(compute: Compute) -> None:
    """:class:`ComputeError` if a pool finds no room on the cluster even when nothing else runs, with what is there."""
    for name, pool in compute.pools.items():
        demand = Demand.of(compute, pool)
        places = capacity(demand)
        if places < pool.least:
            raise ComputeError(
                f"compute.pools.{name} needs {pool.least} workers with {demand} each, and the cluster has room for "
                f"{places}. It has {describe_nodes()}. Lower workers or what each asks for, or add nodes."
            )


def place(demand: Demand, workers: int, seconds: float, give_up: Callable[[], bool]) -> PlacementGroup | None:
    """Reserve room for so many workers, all of it or nothing. None after ``seconds``, or when asked to give up."""
    labels = [dict(demand.labels)] * workers if demand.labels else None
    group = placement_group(
        [dict(demand.resources)] * workers, STRATEGIES[demand.placement], bundle_label_selector=labels
    )
    deadline = time.monotonic() + seconds
    while not group.wait(_POLL_SECONDS):
        if time.monotonic() > deadline or give_up():
            remove_placement_group(group)
            return None
    return group


def at(group: PlacementGroup, number: int) -> PlacementGroupSchedulingStrategy:
    """One of the places that were reserved, as Ray is told of it."""
    return PlacementGroupSchedulingStrategy(group, number, placement_group_capture_child_tasks=False)


def remove(group: PlacementGroup) -> None:
    """Give the room back."""
    remove_placement_group(group)
