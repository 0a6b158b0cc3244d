"""The sender of weights over the network, to a server that sees no folder of ours: a process group with its workers.

The group is gloo's, or NCCL's where both sides compute on CUDA. Tensors are sent in packs, so that many small ones cost
no more than a few large ones.
"""

from __future__ import annotations

import math
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, TCPStore

from postlude.model.weights import InFile, read_whole, tensors_in
from postlude.rollout.serving.within_vllm.postlude_within_vllm import FROM_SENDER, group_of

PACK_BYTES = 64 * 2**20
POLL_SECONDS = 1e-3

Layout = tuple[str, str, list[int]]
"""Name, dtype and shape of a tensor."""


class CallWorkers(Protocol):
    """Calls a method of every worker of a server; returns what each answers."""

    def __call__(self, method: str, **arguments: Any) -> list[Any]: ...


class Sender:
    """Sends weights to the workers that ``call_workers`` reaches, at a host. RuntimeError where one does not come or
    goes away, and whatever ``call_workers`` raises."""

    def __init__(self, call_workers: CallWorkers, host: str, seconds: float) -> None:
        self._call_workers, self._threads = call_workers, ThreadPoolExecutor(1, "sender")
        patience = timedelta(seconds=seconds)
        places = call_workers("place")
        size = 1 + len(places)
        both = torch.cuda.is_available() and all(kind == "cuda" for _, kind in places)
        self._device = torch.device("cuda", torch.cuda.current_device()) if both else torch.device("cpu")
        backend, name = "nccl" if both else "gloo", uuid.uuid4().hex
        own = _own_address(host)
        store = TCPStore(own, 0, is_master=True, wait_for_workers=False, timeout=patience)
        meet = {"host": own, "port": store.port, "name": name, "size": size, "backend": backend, "seconds": seconds}
        answers = self._threads.submit(call_workers, "meet", **meet)
        self._group = group_of(backend, PrefixStore(name, store), 0, size, patience)
        answers.result()
        self._store = store

    def send(self, folder: Path) -> None:
        """Send the safetensors in a folder."""
        packs = pack(folder)
        answers = self._threads.submit(self._call_workers, "receive", packs=packs)
        tensors = _tensors(folder)
        for layouts in packs:
            bytes_of_each = [read_whole(next(tensors)[1]).reshape(-1).view(torch.uint8) for _ in layouts]
            _await(self._group.broadcast([torch.cat(bytes_of_each).to(self._device)], FROM_SENDER), answers)
        answers.result()


def pack(folder: Path) -> list[list[Layout]]:
    """The tensors of the safetensors in a folder, in packs of one dtype and no more than so many bytes; a larger tensor
    is a pack by itself."""
    packs: list[list[Layout]] = []
    size, dtype = 0, None
    for name, tensor in _tensors(folder):
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if tensor.dtype != dtype or size + nbytes > PACK_BYTES:
            packs.append([])
            size, dtype = 0, tensor.dtype
        size += nbytes
        packs[-1].append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
    return packs


def _tensors(folder: Path) -> Iterator[tuple[str, InFile]]:
    for file in sorted(folder.glob("*.safetensors")):
        yield from sorted(tensors_in(file).items())


def _await(work: Any, answers: Future[Any]) -> None:
    """Wait for a broadcast, unless those who were to receive it have failed."""
    while not work.is_completed():
        if answers.done():
            answers.result()
        time.sleep(POLL_SECONDS)
    work.wait()


def _own_address(host: str) -> str:
    """The address of this machine on the way to a host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
