"""The mesh of ranks that hold one model together: which shard of the weights, and which part of each layer, is whose.

Ranks are numbered with the tensor dimension innermost, so that the ranks that talk in every layer are neighbours,
then the shards of the weights, then the replicas of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from postlude.manifest.compute import Shape


@dataclass(frozen=True)
class Mesh:
    """The ranks of this process's group in their places. Every rank makes it at the same time."""

    shape: Shape
    rank: int
    device_type: str = "cpu"

    @cached_property
    def devices(self) -> DeviceMesh:
        """Dimensions ``replica`` (with several), ``shard`` and ``tensor`` (with several), in this order."""
        dimensions = {"replica": self.shape.replicas, "shard": self.shape.shards, "tensor": self.shape.tensor}
        kept = {name: size for name, size in dimensions.items() if size > 1 or name == "shard"}
        return init_device_mesh(self.device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    @property
    def data_rank(self) -> int:
        return self.rank // self.shape.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.shape.tensor

    @property
    def weights(self) -> DeviceMesh:
        """The dimensions that FSDP works on: one that shards, and before it one that replicates, if there is one."""
        return self.devices["replica", "shard"] if self.shape.replicas > 1 else self.devices["shard"]

    @property
    def tensor(self) -> DeviceMesh:
        return self.devices["tensor"]

    @cached_property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that differ in their data alone; None for all ranks."""
        if self.shape.tensor == 1:
            return None
        if self.shape.replicas == 1:
            return self.devices["shard"].get_group()
        return self.devices["replica", "shard"]._flatten("data").get_group()

    @cached_property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that differ in their part of each layer alone."""
        return self.tensor.get_group()

    def sum_over_tensor(self, numbers: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.shape.tensor > 1:
            dist.all_reduce(numbers, group=self.tensor_group)
        return numbers

    def sum_over_shards(self, numbers: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.shape.shards > 1:
            dist.all_reduce(numbers, group=self.devices["shard"].get_group())
        return numbers


def divided_along(tensor: torch.Tensor, dimension: str) -> bool:
    """Whether the ranks along a dimension of the mesh have different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return any(
        name == dimension and placement.is_shard() for name, placement in zip(names, tensor.placements, strict=True)
    )


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
