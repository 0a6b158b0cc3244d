"""The ranks of a training stage, and the few collectives that the trainer needs outside of gradients.

The trainer is SPMD: every rank runs the same code. One process alone has no process group and every
collective here is then the identity, so that a debugger needs nothing set up.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from postlude.manifest.compute import Shape
from postlude.model.mesh import Mesh
from postlude.telemetry.readings import note_link

COLLECTIVE_DEADLINE = timedelta(minutes=20)
BUCKET_BYTES = 64 * 2**20
PROBE_BYTES = 4 * 2**20
"""What is sent to measure a connection."""


@dataclass(frozen=True)
class Workers:
    """This process among the ranks that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    mesh: Mesh | None = None
    """Where the ranks hold each model together; None where each has all of it."""

    @property
    def data_rank(self) -> int:
        """Which share of the data is this rank's."""
        return self.rank if self.mesh is None else self.mesh.data_rank

    @property
    def data_world(self) -> int:
        """How many shares the data are dealt in."""
        return self.world if self.mesh is None else self.mesh.shape.data

    @property
    def speaks(self) -> bool:
        """Whether it is this rank, of those with the same data, that tells what became of them."""
        return self.mesh is None or self.mesh.tensor_rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    @staticmethod
    def join(gpus_per_worker: float = 0, shape: Callable[[int], Shape | None] = lambda world: None) -> Workers:
        """Meet the other ranks as the environment says (torchrun's variables); alone if it says nothing.

        ``shape`` says how so many ranks hold each model together, or None.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if gpus_per_worker:
            # One process may see its own device alone, or all of the node.
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            meeting = _meeting(rank, world)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo",
                init_method=os.environ.get("POSTLUDE_RENDEZVOUS", "env://") if meeting is None else None,
                store=meeting,
                rank=rank,
                world_size=world,
                timeout=COLLECTIVE_DEADLINE,
            )
            wanted = shape(world)
            mesh = None if wanted is None else Mesh(wanted, rank, device.type)
            workers = Workers(rank, world, device, mesh)
            workers.measure_link()
            return workers
        return Workers(rank, world, device)

    def measure_link(self) -> None:
        """Note how fast the ranks reach each other, and on a GPU how fast it is reached: a few milliseconds."""
        number, many = torch.zeros(1), torch.zeros(PROBE_BYTES // 4, device=self.device)
        dist.barrier()
        spent = [_seconds(lambda: dist.all_reduce(number), self.device) for _ in range(5)]
        whole = min(_seconds(lambda: dist.all_reduce(many), self.device) for _ in range(3))
        note_link(rank_round_trip_seconds=min(spent), collective_bytes_per_second=PROBE_BYTES / whole)
        if self.device.type == "cuda":
            host = torch.zeros(PROBE_BYTES // 4, pin_memory=True)
            to_device = min(_seconds(lambda: many.copy_(host), self.device) for _ in range(3))
            to_host = min(_seconds(lambda: host.copy_(many), self.device) for _ in range(3))
            note_link(
                host_to_device_bytes_per_second=PROBE_BYTES / to_device,
                device_to_host_bytes_per_second=PROBE_BYTES / to_host,
            )

    def leave(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Sum each gradient over the ranks, in place, in flat buckets of one dtype.

        The order is that of the sequence, the same on every rank, so the sum is the same from run to run.
        """
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for gradient in gradients:
            if bucket and (gradient.dtype != bucket[0].dtype or size >= BUCKET_BYTES):
                self._sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
        if bucket:
            self._sum_bucket(bucket)

    @staticmethod
    def _sum_bucket(bucket: list[Tensor]) -> None:
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        start = 0
        for gradient in bucket:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sum each number over the shares of the data, in float64. Every rank gives the same keys."""
        if self.data_world == 1:
            return {name: float(number) for name, number in numbers.items()}
        names = sorted(numbers)
        values = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
        dist.all_reduce(values, group=None if self.mesh is None else self.mesh.data_group)
        return dict(zip(names, values.tolist(), strict=True))

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on every rank."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def from_lead(self, item: Any) -> Any:
        """The leading rank's item, on every rank."""
        if self.world == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()


def _meeting(rank: int, world: int) -> dist.Store | None:
    """The store by which ranks meet whose address is known: the first rank listens there and nowhere else, where torch
    would listen on every interface. None where torch finds it."""
    host = os.environ.get("MASTER_ADDR", "")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    if "POSTLUDE_RENDEZVOUS" in os.environ or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        return None
    port, listening = int(os.environ["MASTER_PORT"]), -1
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=world).detach()
    return dist.TCPStore(
        host,
        port,
        world,
        rank == 0,
        timeout=COLLECTIVE_DEADLINE,
        master_listen_fd=listening if rank == 0 else None,
    )


def _seconds(what: Callable[[], Any], device: torch.device) -> float:
    """How long something takes to be done."""
    begin = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
