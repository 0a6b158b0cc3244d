"""Where the nodes come from: Ray started inside this process, or a cluster that is there already.

A :class:`Cluster` is what the rest of the project sees of it. A further provider is a function that makes one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from postlude.cluster.transport import check_transport, probe, variables
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute
from postlude.telemetry.progress import waiting

OBJECT_STORE_BYTES = 256 * 2**20
"""Of shared memory for what ranks and controller hand each other on this machine."""

_FOLDER = "postlude-ray-"
"""Begin of the names of the folders for Ray's sockets and logs."""
_LONGEST_PLACE = 32
"""Characters of the path of the folder that holds them: with more, the paths of sockets are too long for Linux."""

_QUIET = {
    # Ranks work in a thread that is not the first of its process. glibc gives such threads heaps of 64 MiB, where large
    # tensors are mapped, cleared and unmapped again and again: a fifth of a step. It is read when a process begins.
    "MALLOC_ARENA_MAX": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Nodes and workers are found dead within seconds, not minutes; one that a busy machine holds up is not dead.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
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
    """The cluster that the manifest names, for as long as the context lasts.

    :class:`ComputeError` if it is not there, does not let this process in, or is not encrypted where it has to be.
    Where this process has opened one already, that one is used and stays open.
    """
    check_transport(compute)
    # What Ray's own code reads when it is loaded has to be there before.
    if compute.provider == "local":
        said, told = _QUIET, {"RAY_USE_TLS": "0", **_own_token()}
    else:
        said, told = {}, variables(compute.transport)
    with _environment(said), _environment(told, over=True):
        import ray

        if ray.is_initialized():
            yield Cluster("lo" if compute.provider == "local" else None)
            return
        with _OPENERS[compute.provider](compute) as cluster:
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
    with open(os.path.join(folder, "held"), "w") as held:
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
    probe(address, compute.transport)
    try:
        with waiting(f"the Ray cluster at {address}"):
            sent = {"py_modules": compute.code} if compute.code else None
            ray.init(address=address, configure_logging=False, runtime_env=sent)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ComputeError(f"No Ray cluster answers at {address}: {_first_line(error)}") from error
    yield Cluster()


_OPENERS: Mapping[str, Any] = {"local": _local, "ray": _existing}


@cache
def _own_token() -> dict[str, str]:
    """A token that only what this process starts knows: others of this machine cannot call on its Ray.

    Ray reads it once, when it is loaded: it is the same for all that this process starts, and a program that has loaded
    Ray before goes without.
    """
    if "ray" in sys.modules:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


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
def _environment(variables: Mapping[str, str], over: bool = False) -> Iterator[None]:
    """Variables for the processes that Ray starts, where the user has not set them; ``over`` what the user has set."""
    added = {name: value for name, value in variables.items() if over or name not in os.environ}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
