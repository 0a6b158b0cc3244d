"""The provider ``ray``: a cluster of Ray that is there already."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from postlude.cluster.providers.base import Provider, job_without_folder
from postlude.cluster.transport import probe, ray_variables
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute
from postlude.runs import Run
from postlude.telemetry.progress import waiting


class Ray(Provider):
    """The cluster at ``compute.address``, or where RAY_ADDRESS says."""

    def variables(self, compute: Compute) -> Mapping[str, str]:
        return ray_variables(compute.transport)

    @contextmanager
    def open(self, compute: Compute) -> Iterator[None]:
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
                packages = {"py_modules": compute.code} if compute.code else None
                job = job_without_folder()
                ray.init(address=address, configure_logging=False, runtime_env=packages, job_config=job)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ComputeError(f"No Ray cluster answers at {address}: {reason}") from error
        yield

    def submit(self, run: Run, command: Sequence[str]) -> str:
        """Hand the command to the cluster's job server, which must share this machine's disk."""
        server = os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        try:
            from ray.job_submission import JobSubmissionClient

            client = JobSubmissionClient(server)
            job = client.submit_job(
                entrypoint=f"{shlex.join(['cd', os.getcwd()])} && {shlex.join(['python', *command])}"
            )
        except (ImportError, ConnectionError, RuntimeError) as error:
            raise ComputeError(
                f"The cluster's job server cannot be used: {str(error).splitlines()[0]} It is part of Ray's dashboard "
                "(`pip install 'ray[default]'`, `ray start --head --include-dashboard=true`); RAY_API_SERVER_ADDRESS "
                "says where it is. Or run without --detach on the head."
            ) from error
        return f"job {job}: `ray job logs {job}` and `ray job stop {job}` reach it"
