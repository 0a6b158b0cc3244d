"""What runs within vLLM's own processes, in its environment: it knows nothing of ours, and nothing of ours imports it.

The engine ``vllm`` puts this folder on the path of the servers that it starts.
"""

from __future__ import annotations

from typing import Any


class TakesAdapters:
    """Mixed into vLLM's worker."""

    def take_adapter(self, folder: str, name: str) -> None:
        """Put the adapter in a folder in the place of the one that is there, for the requests in flight too.

        The server's own way to load one in place marks the requests that come later to load it again at every step.
        """
        from vllm.lora.request import LoRARequest

        worker: Any = self
        worker.add_lora(LoRARequest(name, 1, folder, load_inplace=True))
