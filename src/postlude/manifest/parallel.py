"""How many ranks hold a model together, and in which dimensions. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from postlude.manifest.compute import Elastic, Parallel
from postlude.manifest.problem import ManifestError


@dataclass(frozen=True)
class Shape:
    """How many ranks lie along each dimension."""

    replicas: int = 1
    """Groups of ranks that hold all of the weights each."""
    shards: int = 1
    """Ranks that the weights are divided among, each with data of its own."""
    tensor: int = 1
    """Ranks that divide every layer, with the same data."""

    @staticmethod
    def of(world: int, tensor: int, replicas: int) -> Shape:
        """What is left of the ranks shards the weights. ManifestError if they do not divide."""
        if world % (tensor * replicas):
            product = f"parallel.tensor ({tensor})" + (f" times parallel.replicas ({replicas})" if replicas > 1 else "")
            raise ManifestError(
                f"{product} does not divide the {world} worker{'s' if world > 1 else ''} of the pool. Give the pool a "
                f"multiple of {tensor * replicas} workers, or lower it."
            )
        return Shape(replicas, world // (tensor * replicas), tensor)

    @property
    def data(self) -> int:
        """Ranks that have data of their own."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        return f"{self.data}x{self.tensor}"


def shape_of(parallel: Parallel, world: int) -> Shape | None:
    """The shape of so many ranks; None where each has all of every model. ManifestError if they do not divide."""
    if not parallel.divides:
        return None
    return Shape.of(world, parallel.tensor, parallel.replicas)


def check_workers(parallel: Parallel, workers: int | Elastic) -> None:
    """ManifestError if a pool of so many workers cannot hold models like this."""
    if isinstance(workers, int):
        shape_of(parallel, workers)
    elif parallel.divides and parallel.tensor * parallel.replicas > 1:
        raise ManifestError(
            "parallel.tensor and parallel.replicas need a number of workers that does not change, and the pool has "
            f"between {workers.min} and {workers.max}. Give compute.pools a fixed number, or leave them at 1: sharded "
            "weights fit any number."
        )
