"""What the rest of the project asks of a provider of nodes, and the cluster that it opens.

A provider is one class in one file, registered under the kind ``providers``; nothing outside that file knows its name.
Whatever the nodes are, Ray runs on them: once :meth:`Provider.open` has joined it, placement, supervision and recovery
are the same everywhere. These files import without Ray and torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from postlude.cluster.transport import check_transport
from postlude.errors import ComputeError
from postlude.manifest.compute import Compute, ProviderConfig
from postlude.runs import Run


class Provider(ProviderConfig):
    """Where nodes come from. Its fields are keys of ``compute.provider``."""

    starts_ray: ClassVar[bool] = False
    """Whether Ray's own processes belong to the command, which starts them and can start them anew."""
    interface: ClassVar[str | None] = None
    """The network interface by which ranks meet, where it is the same on every node."""
    defaults: ClassVar[Mapping[str, str]] = {}
    """Variables that Ray and what it starts read, where the user has not set them."""

    def variables(self, compute: Compute) -> Mapping[str, str]:
        """Variables that Ray reads when it is loaded, whatever the user has set. ComputeError for what cannot be so."""
        return {}

    def open(self, compute: Compute) -> AbstractContextManager[None]:
        """Have this process be part of Ray on the nodes, with ``ray.init``, for as long as the context lasts.

        :class:`ComputeError` if they are not there or do not let this process in.
        """
        raise NotImplementedError

    def check_pools(self, compute: Compute) -> None:
        """:class:`ComputeError` if it is known before the nodes are asked that they cannot hold the pools."""

    def submit(self, run: Run, command: Sequence[str]) -> str:
        """Start ``python`` with these arguments, where it outlives this process; what reaches it, in words.

        :class:`ComputeError` if that cannot be.
        """
        raise ComputeError(
            f"The provider '{self.component_name}' takes no command that outlives the terminal. Run without --detach."
        )


def provider_of(compute: Compute) -> Provider:
    """The provider that the manifest names."""
    if not isinstance(compute.provider, Provider):
        raise ComputeError(
            f"compute.provider: '{compute.provider.component_name}' is not derived from {Provider.__module__}.Provider."
        )
    return compute.provider


@contextmanager
def open_cluster(compute: Compute) -> Iterator[Provider]:
    """Join the cluster of the provider that the manifest names, for as long as the context lasts.

    :class:`ComputeError` if it is not there, does not let this process in, or is not encrypted where it has to be.
    Where this process has opened one already, that one is used and stays open.
    """
    check_transport(compute)
    provider = provider_of(compute)
    # What Ray's own code reads when it is loaded has to be there before.
    defaults = {name: value for name, value in provider.defaults.items() if name not in os.environ}
    with variables_set({**defaults, **provider.variables(compute)}):
        import ray

        if ray.is_initialized():
            yield provider
            return
        try:
            with provider.open(compute):
                yield provider
        finally:
            ray.shutdown()


def job_without_folder() -> Any:
    """Ray's settings of a job whose workers look for modules where this process does: Ray itself would put the current
    folder before all that is installed."""
    from ray.job_config import JobConfig

    class WithoutFolder(JobConfig):
        @property
        def _py_driver_sys_path(self) -> list[str]:
            return []

        @_py_driver_sys_path.setter
        def _py_driver_sys_path(self, path: list[str]) -> None:
            """Ray adds to it."""

    return WithoutFolder()


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for this process and those that it starts, for as long as the context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
