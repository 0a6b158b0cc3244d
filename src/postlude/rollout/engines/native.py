"""The engine ``native``: the policy's own forward pass, where it is trained or in a process of its own."""

from __future__ import annotations

from postlude.rollout.serving.native_server import NativeServer
from postlude.rollout.serving.server import EngineChoice, Server, Serving


class Native(EngineChoice):
    """Any model that transformers knows, through its own forward pass."""

    apart: bool = False
    """Whether it is a process of its own beside each worker, with its own copy of the weights, so that it can answer
    while the worker trains."""

    @property
    def is_external(self) -> bool:
        return self.apart

    def server(self, serving: Serving) -> Server:
        return NativeServer(serving)
