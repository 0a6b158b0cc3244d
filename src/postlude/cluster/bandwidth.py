"""The bandwidth between the nodes of a pool, measured by a short transfer over plain sockets before anything starts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import ray

from postlude.cluster import placement
from postlude.cluster.placement import Demand
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute

MEASURE_SECONDS = 1.0
_PIECE = bytes(2**20)


class Station:
    """A process on a node that can be sent to, and send."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._swallow, daemon=True).start()

    def place(self) -> tuple[str, int]:
        """Its IP address and port."""
        return ray.util.get_node_ip_address(), self._server.getsockname()[1]

    def _swallow(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection, contextlib.suppress(OSError):
                while connection.recv(2**20):
                    pass

    def send(self, host: str, port: int) -> float:
        """Send for a while, and return the gigabits a second."""
        sent, begin = 0, time.perf_counter()
        with socket.create_connection((host, port), 10.0) as connection:
            while time.perf_counter() - begin < MEASURE_SECONDS:
                connection.sendall(_PIECE)
                sent += len(_PIECE)
            connection.shutdown(socket.SHUT_WR)
        return 8e-9 * sent / (time.perf_counter() - begin)


def check_bandwidth(compute: Compute) -> None:
    """:class:`ComputeError` if the nodes of a pool reach each other more slowly than the manifest expects.

    Workers are placed as they will be; each that is on another node than the one before sends to it.
    """
    for name, pool in compute.pools.items():
        if pool.bandwidth_gbit is None or pool.least < 2:
            continue
        for source, target, measured in measure_bandwidth(Demand.of(compute, pool), pool.least):
            if measured < pool.bandwidth_gbit:
                raise ComputeError(
                    f"compute.pools.{name}.bandwidth_gbit is {pool.bandwidth_gbit:g}, and from {source} to {target} "
                    f"{measured:.2f} gigabits a second were measured. Look at the network between them, place the pool "
                    "otherwise, or lower the key."
                )


def measure_bandwidth(demand: Demand, workers: int) -> list[tuple[str, str, float]]:
    """Gigabits a second from each worker's node to that of the next, as sender, receiver and rate. ComputeError without
    room."""
    room = placement.place(demand, workers, 30.0, lambda: False)
    if room is None:
        raise ComputeError(f"There is no room to measure the network between {workers} workers with {demand} each.")
    actor: Any = ray.remote(Station)
    stations = []
    try:
        for number in range(workers):
            stations.append(actor.options(num_cpus=0, scheduling_strategy=placement.at(room, number)).remote())
        places = ray.get([station.place.remote() for station in stations], timeout=60.0)
        pairs = [(sender, (sender + 1) % workers) for sender in range(workers)]
        apart = [pair for pair in pairs if places[pair[0]][0] != places[pair[1]][0]] or pairs[:1]
        rates = [ray.get(stations[sender].send.remote(*places[to]), timeout=60.0) for sender, to in apart]
        return [(places[sender][0], places[to][0], rate) for (sender, to), rate in zip(apart, rates, strict=True)]
    finally:
        for station in stations:
            ray.kill(station)
        placement.remove(room)
