"""A provider of a user's own: this machine, under labels by which pools ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from postlude.cluster.providers.base import Provider
from postlude.manifest.compute import Compute


class Labelled(Provider):
    """Ray on this machine, as a node that has labels."""

    is_remote = False

    labels: dict[str, str]

    def variables(self, compute: Compute) -> Mapping[str, str]:
        return {"RAY_USE_TLS": "0", "RAY_AUTH_MODE": "disabled"}

    @contextmanager
    def open(self, compute: Compute) -> Iterator[None]:
        import ray

        ray.init(address="local", labels=self.labels, include_dashboard=False, configure_logging=False)
        yield
