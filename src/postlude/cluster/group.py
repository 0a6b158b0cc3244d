"""A group of workers, one actor for each rank, that is called as one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
import ray

from postlude.cluster import placement
from postlude.cluster.failure import Failure, Kind
from postlude.cluster.fork_server import runtime_environment
from postlude.cluster.placement import Demand
from postlude.cluster.worker import Address, Worker, WorkerSetup

NAMESPACE = "postlude"
START_SECONDS = 180.0
"""How long the processes of a group may take to start and to import what they need."""
GONE_SECONDS = 20.0
DEAF_SECONDS = 3.0


class WorkerGroup:
    """The workers of one stage on one pool. A context manager: on leaving none of its processes is alive.

    ``name`` is that of its work in this run: no two groups of one name are ever at work at once, so what a controller
    that was killed has left behind is killed first. :class:`Failure` if they do not come up.
    """

    def __init__(
        self, name: str, demand: Demand, room: Any, size: int, setup: WorkerSetup, interface: str | None
    ) -> None:
        self.size, self._room = size, room
        self.addresses: list[Address] = []
        self.workers: list[Any] = []
        options = actor_options(demand)
        actor: Any = ray.remote(concurrency_groups={"control": 1})(Worker)  # type: ignore[call-overload]
        try:
            remove_left_behind(name)
            for rank in range(size):
                place = placement.at(room, rank)
                named = actor.options(name=actor_name(name, rank), scheduling_strategy=place, **options)
                self.workers.append(named.remote(rank, setup))
            self.addresses = self._await_start([worker.address.remote() for worker in self.workers])
            meeting = f"{self.addresses[0].host}:{self.addresses[0].free_port}"
            numbers: Counter[str] = Counter()
            places = []
            for worker, address in zip(self.workers, self.addresses, strict=True):
                places.append(worker.take_place.remote(size, numbers[address.node], meeting, interface))
                numbers[address.node] += 1
            self._await_start(places)
        except BaseException:
            self.close()
            raise

    # --- calls ----------------------------------------------------------------------------------------------

    def work(self, function: str, task: Any, lease_seconds: float) -> list[Any]:
        """Have every rank call ``function`` ("module:name") with the task; the references to their outcomes.

        A rank ends itself when nobody has looked at it for ``lease_seconds``.
        """
        shared = ray.put(task)  # once for all, however large it is
        return [worker.work.remote(function, shared, lease_seconds) for worker in self.workers]

    def stop(self, at_checkpoint: bool = False) -> None:
        """Ask every rank to stop after the step in progress, or after the next checkpoint."""
        for worker in self.workers:
            worker.stop.remote(at_checkpoint)

    def stacks(self, seconds: float = 3.0) -> dict[int, str]:
        """Where each rank is, of those that answer in time."""
        ranks = {worker.stack.remote(): rank for rank, worker in enumerate(self.workers)}
        done, _ = ray.wait(list(ranks), num_returns=len(ranks), timeout=seconds)
        stacks = {}
        for reference in done:
            with contextlib.suppress(ray.exceptions.RayError):
                stacks[ranks[reference]] = ray.get(reference)
        return stacks

    def _await_start(self, references: Sequence[Any]) -> list[Any]:
        try:
            return ray.get(list(references), timeout=START_SECONDS)
        except ray.exceptions.RayActorError as error:
            raise Failure(Kind.PROCESS, f"a worker died while it started: {str(error).splitlines()[0]}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise Failure(Kind.HANG, f"the workers did not start within {START_SECONDS:.0f} seconds") from error
        except ray.exceptions.RayTaskError as error:
            raise Failure(Kind.PROGRAM, f"a worker could not start: {error.cause}", trace=str(error)) from error

    # --- the end --------------------------------------------------------------------------------------------

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def own_host(self) -> str:
        """The address of the node that this process is on."""
        return ray.util.get_node_ip_address()

    def close(self) -> None:
        """Kill every process of the group, see that they are gone, and give the room back."""
        for worker in self.workers:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(worker)
        here = [address.pid for address in self.addresses if address.host == self.own_host]
        begin = time.monotonic()
        while any(map(_is_alive, here)) and (waited := time.monotonic() - begin) < GONE_SECONDS:
            if waited > DEAF_SECONDS:  # one that was stopped does not hear Ray
                for pid in here:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        placement.remove(self._room)


def actor_name(name: str, rank: int) -> str:
    """Ray's name of one of a group of actors."""
    return f"{name}:{rank}"


def actor_options(demand: Demand) -> dict[str, Any]:
    """What Ray is asked for an actor."""
    return {
        "num_cpus": demand.resources.get("CPU", 0),
        "num_gpus": demand.resources.get("GPU", 0),
        "memory": int(demand.resources.get("memory", 0)) or None,
        "namespace": NAMESPACE,
        "max_restarts": 0,
        "max_task_retries": 0,
        **runtime_environment(has_gpus=demand.resources.get("GPU", 0) > 0),
    }


def remove_left_behind(name: str) -> None:
    """Kill workers of this name that another controller has left, and wait until they are gone."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        names = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        left = [each for each in names if each.rpartition(":")[0] == name]
        if not left or time.monotonic() > deadline:
            return
        for each in left:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.kill(ray.get_actor(each, NAMESPACE))
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
