"""What runs within vLLM's own processes, in its environment: torch and vLLM are all that it imports.

The engine ``vllm`` puts this folder on the path of the servers that it starts. Servers that others start need this file
on their path, and ``--worker-extension-cls postlude_within_vllm.TakesWeights``, to be sent weights over the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

FROM_SENDER = BroadcastOptions()
FROM_SENDER.rootRank = 0


class TakesWeights:
    """Mixed into vLLM's worker. Each call reaches every worker of a server."""

    rank: int
    device: torch.device

    def take_adapter(self, folder: str, name: str) -> None:
        """Put the adapter in a folder in the place of the one that is there, for the requests in flight too.

        The server's own way to load one in place marks the requests that come later to load it again at every step.
        """
        from vllm.lora.request import LoRARequest

        worker: Any = self
        worker.add_lora(LoRARequest(name, 1, folder, load_inplace=True))

    def place(self) -> list[Any]:
        """Its number among the server's workers, and the kind of its device."""
        return [self.rank, self.device.type]

    def meet(self, host: str, port: int, name: str, size: int, backend: str, seconds: float) -> None:
        """Form a group with who sends weights, who has rank 0, and the store at host and port."""
        patience = timedelta(seconds=seconds)
        store = PrefixStore(name, TCPStore(host, port, is_master=False, timeout=patience))
        self._group = group_of(backend, store, self.rank + 1, size, patience)

    def receive(self, packs: list[list[tuple[str, str, list[int]]]]) -> None:
        """Take over the weights that are sent: packs of tensors, each tensor with name, dtype and shape."""
        worker: Any = self
        worker.model_runner.reload_weights(weights_iterator=self._received(packs))

    def _received(self, packs: list[list[tuple[str, str, list[int]]]]) -> Iterator[tuple[str, torch.Tensor]]:
        for pack in packs:
            layout = [(name, getattr(torch, dtype), shape) for name, dtype, shape in pack]
            sizes = [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in layout]
            whole = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            self._group.broadcast([whole], FROM_SENDER).wait()
            for (name, dtype, shape), part in zip(layout, whole.split(sizes), strict=True):
                yield name, part.view(dtype).view(shape)


def group_of(backend: str, store: Any, rank: int, size: int, patience: timedelta) -> Any:
    """A process group of its own, beside those that there may be: ``gloo``, or ``nccl`` on the devices of CUDA."""
    if backend == "gloo":
        return ProcessGroupGloo(store, rank, size, patience)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = patience
    return ProcessGroupNCCL(store, rank, size, options)
