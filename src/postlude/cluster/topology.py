"""The pools of the manifest held against the nodes of the cluster, before anything starts."""

from __future__ import annotations

from postlude.cluster import placement
from postlude.cluster.placement import Demand
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute


def check_topology(compute: Compute) -> None:
    """:class:`ComputeError` if a pool finds no room on the cluster even when nothing else runs, with what is there."""
    for name, pool in compute.pools.items():
        demand = Demand.of(compute, pool)
        room = placement.capacity(demand)
        if room < pool.least:
            raise ComputeError(
                f"compute.pools.{name} needs {pool.least} workers with {demand} each, and the cluster has room for "
                f"{room}. It has {placement.described_nodes()}. Lower workers or what each asks for, or add nodes."
            )
