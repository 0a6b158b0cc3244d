"""The provider ``local``: this machine, with Ray inside this process. Its servers die with it, however it dies."""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

from postlude import storage
from postlude.cluster import keeper
from postlude.cluster.providers.base import Provider, job_without_folder
from postlude.cluster.ray_processes import watched
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute
from postlude.runs import Run
from postlude.telemetry import hardware
from postlude.telemetry.progress import say, waiting

OBJECT_STORE_BYTES = 256 * 2**20
"""Of shared memory for what ranks and controller hand each other on this machine."""
START_SECONDS = 30.0
"""How long a detached run may take to take the run up."""

_LONGEST_PLACE = 30
"""Characters of the path of the folder that holds them: with more, the paths of sockets are too long for Linux."""
_POLL_SECONDS = 0.2


class Local(Provider):
    """This machine: Ray is started inside the command, and ends with it."""

    is_remote = False
    starts_ray = True
    unused = {
        "address": "'address' belongs to 'provider: ray'",
        "code": "'code' is for nodes that have another disk; 'provider: local' reads what is here",
    }
    interface = "lo"
    defaults = {
        # Ranks work in a thread that is not the first of its process. glibc gives such threads heaps of 64 MiB, where
        # large tensors are mapped, cleared and unmapped again and again: a fifth of a step. Read when a process begins.
        "MALLOC_ARENA_MAX": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Nodes and workers are found dead within seconds, not minutes; one that a busy machine holds up is not dead.
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "10000",
        "RAY_health_check_failure_threshold": "3",
        # So long a GCS that died as it started is waited for, in a call that lets no other thread run.
        "RAY_gcs_server_port_wait_time_s": "15",
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

    def variables(self, compute: Compute) -> Mapping[str, str]:
        # Ray's word for a machine that is alone: all of its servers listen on the loopback address.
        return {"RAY_USE_TLS": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **_own_token()}

    @contextmanager
    def open(self, compute: Compute) -> Iterator[None]:
        import ray

        _check_file_size()
        above = tempfile.gettempdir()
        above = above if len(above) <= _LONGEST_PLACE else "/tmp"
        workers = sum(pool.most * (pool.cpus_per_worker or 0) for pool in compute.pools.values())
        with storage.scratch_folder("ray", above) as folder:
            try:
                with watched(float(compute.supervision.silence_seconds), _lost):
                    with waiting("Ray to start"):
                        ray.init(
                            address="local",
                            num_cpus=max(workers, hardware.cores()),
                            include_dashboard=False,
                            object_store_memory=OBJECT_STORE_BYTES,
                            # Ray opens its own folder to everybody, and the one round it is ours alone.
                            _temp_dir=os.path.join(folder, "r"),
                            _node_ip_address="127.0.0.1",
                            job_config=job_without_folder(),
                            configure_logging=False,
                        )
                    yield
            finally:
                ray.shutdown()

    def check_pools(self, compute: Compute) -> None:
        for what, count, per_worker in (
            ("GPUs", hardware.gpus, lambda pool: pool.gpus_per_worker),
            ("cores", hardware.cores, lambda pool: pool.cpus_per_worker or 0),
            ("bytes of memory", hardware.machine_bytes, lambda pool: pool.memory_per_worker or 0),
        ):
            wanted = sum(pool.least * per_worker(pool) for pool in compute.pools.values())
            if wanted and wanted > (there := count()):
                pools = ", ".join(f"{name}: {pool.least} of {per_worker(pool)}" for name, pool in compute.pools.items())
                raise ComputeError(
                    f"compute.pools asks for {wanted:,} {what} ({pools}), but this machine has {there:,}. "
                    "Lower workers or what each asks for, or name a cluster with 'provider: ray'."
                )
        if any(pool.labels for pool in compute.pools.values()):
            raise ComputeError("compute.pools asks for nodes with labels, and 'provider: local' has none.")

    def submit(self, run: Run, command: Sequence[str]) -> str:
        """Start the command in a session of its own, whose output goes to the run directory, and wait until it has the
        run."""
        if not storage.has_path(run.output):
            raise ComputeError(
                "A detached run on this machine keeps its output in the run directory, which must be local, and not "
                "encrypted, since whatever a process says is written as it is. Run it without --detach."
            )
        os.makedirs(storage.local_path(run.uri), exist_ok=True)
        with open(storage.local_path(run.output), "ab", opener=partial(os.open, mode=0o600)) as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        with waiting(f"process {process.pid} to take the run up"):
            while run.holder() is None and process.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        if process.poll():
            raise ComputeError(
                f"The process ended at once with {process.returncode}. `postlude logs {run.uri}` has its words."
            )
        return f"process {process.pid}"


@cache
def _own_token() -> dict[str, str]:
    """A token that only what this process starts knows: others of this machine cannot call on its Ray.

    Ray reads it once, when it is loaded: it is the same for all that this process starts, and a program that has loaded
    Ray before goes without.
    """
    if "ray" in sys.modules:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _lost(reason: str) -> None:
    keeper.give_up(reason)
    say(f"{reason}. Run again.")


def _check_file_size() -> None:
    """ComputeError if Ray's processes could not make the file that they share memory by."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < OBJECT_STORE_BYTES:
        raise ComputeError(
            f"This process may write files of {limit:,} bytes at most (`ulimit -f`), and Ray needs one of "
            f"{OBJECT_STORE_BYTES:,}. Raise the limit, or run with --inline."
        )
