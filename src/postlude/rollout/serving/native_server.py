"""The process of a native engine that is apart: ``python -m postlude.rollout.serving.native_server FD``.

It is asked over the socket with that file descriptor: ``(what, arguments)`` comes, ``("done", answer)`` or
``("failed", error)`` goes back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from postlude.errors import UserError
from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.native import NativeEngine


class Service:
    """What can be asked for."""

    def start(self, folder: str, version: int, dtype: str, concurrency: int) -> None:
        """Read the model in a folder."""
        self._dtype, self._concurrency = getattr(torch, dtype), concurrency
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.update(folder, version)

    def update(self, folder: str, version: int) -> None:
        """Read its weights anew."""
        causal = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype, attn_implementation="sdpa")
        causal.to(self._device)  # type: ignore[arg-type]
        self._engine = NativeEngine(causal, None, self._concurrency)
        self._version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None) -> list[Completion]:
        """As :meth:`postlude.rollout.engine.Engine.generate`."""
        made = self._engine.generate(requests, sampling, enough)
        return [replace(one, versions=(self._version,) * len(one.tokens)) for one in made]


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    connection, service = Connection(int(sys.argv[1])), Service()
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("done", getattr(service, what)(*arguments))
        except (UserError, ValueError) as error:
            answer = ("failed", error)
        connection.send(answer)


if __name__ == "__main__":
    main()
