"""Where the nodes come from: Ray started inside this process, or a cluster that is there already.

A :class:`Cluster` is what the rest of the project sees of it. A further provider is a function that makes one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from postlude.manifest.errors import ComputeError
from postlude.manifest.schema import Compute
from postlude.telemetry.progress import waiting

OBJECT_STORE_BYTES = 256 * 2**20
"""Of shared memory for what ranks and controller hand each other on this machine."""

_FOLDER = "postlude-ray-"
"""Begin of the names of the folders for Ray's sockets and logs."""
_LONGEST_PLACE = 32
"""Characters of the path of the folder that holds them: with more, the paths of sockets are too long for Linux."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Nodes and workers are found dead within seconds, not minutes.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # Workers are no less than what else runs here, and none is started before it is asked for.
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "0",
    # Nobody reads these statistics, and every core that they wake on is one that computes.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_timeline": "0",
    # The controller sets CUDA_VISIBLE_DEVICES by what the manifest says, also where that is nothing.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Cluster:
    """Nodes on which workers can be started."""

    interface: str | None = None
    """The network interface by which ranks meet, where it is the same on every node."""


@contextmanager
def open_cluster(compute: Compute) -> Iterator[Cluster]:
    """The cluster that the manifest names, for as long as the context lasts. ComputeError if it is not there.

    Where this process has opened one already, that one is used and stays open.
    """
    import ray

    if ray.is_initialized():
        yield Cluster("lo" if compute.provider == "local" else None)
        return
    with _environment(_QUIET), _OPENERS[compute.provider](compute) as cluster:
        try:
            yield cluster
        finally:
            ray.shutdown()


@contextmanager
def _local(compute: Compute) -> Iterator[Cluster]:
    """Ray inside this process: its servers die with it, however it dies."""
    import ray

    _sweep()
    folder = tempfile.mkdtemp(prefix=_FOLDER, dir=_folders())
    with open(os.path.join(folder, "held"), "w") as held, _environment({"RAY_AUTH_MODE": "disabled"}):
        fcntl.flock(held, fcntl.LOCK_EX)
        workers = sum(pool.most * (pool.cpus_per_worker or 0) for pool in compute.pools.values())
        try:
            with waiting("Ray to start"):
                ray.init(
                    address="local",
                    num_cpus=max(workers, len(os.sched_getaffinity(0))),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    configure_logging=False,
                )
            yield Cluster("lo")
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _existing(compute: Compute) -> Iterator[Cluster]:
    """A cluster that is there: at the address that the manifest gives, or the environment."""
    import ray

    address = compute.address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ComputeError(
            "compute.provider is 'ray', and neither compute.address nor RAY_ADDRESS says where the cluster is. "
            "Give host:port of its head."
        )
    try:
        with waiting(f"the Ray cluster at {address}"):
            sent = {"py_modules": compute.code} if compute.code else None
            ray.init(address=address, configure_logging=False, runtime_env=sent)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ComputeError(f"No Ray cluster answers at {address}: {_first_line(error)}") from error
    yield Cluster()


_OPENERS: Mapping[str, Any] = {"local": _local, "ray": _existing}


def _folders() -> str:
    place = tempfile.gettempdir()
    return place if len(place) <= _LONGEST_PLACE else "/tmp"


def _sweep() -> None:
    """Remove the folders of processes that were killed."""
    place = _folders()
    for name in os.listdir(place):
        if not name.startswith(_FOLDER):
            continue
        with contextlib.suppress(OSError), open(os.path.join(place, name, "held")) as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.join(place, name), ignore_errors=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that Ray starts, where the user has not set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
