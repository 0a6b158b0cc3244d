"""A native engine in a process of its own, and how it is asked.

    python -m postlude.rollout.serving.native_server FD DTYPE CONCURRENCY

Over the socket with that file descriptor the process is asked for a method of :class:`_Engine`, ``(method,
arguments)``, and answers ``("done", answer)`` or ``("failed", error)``, one call after the other. Whoever asks loads no
torch.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from postlude.errors import UserError
from postlude.rollout.engine import Completion, Enough, Request, Sampling, with_version
from postlude.rollout.serving.guardian import Process
from postlude.rollout.serving.server import EngineDied, Serving
from postlude.telemetry import openmp

START_SECONDS = 300.0


class NativeServer:
    """A process with a :class:`~postlude.rollout.native.NativeEngine`. One call at a time: the others wait."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._process: Process | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def start(self, room: Path, folder: Path, version: int) -> None:
        ours, theirs = socket.socketpair()
        options = [str(theirs.fileno()), self._serving.dtype, str(self._serving.concurrency)]
        command = [sys.executable, "-P", "-m", "postlude.rollout.serving.native_server", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._serving.threads)}
        self._process = Process(room, command, environment, theirs.fileno())
        theirs.close()
        self._connection = Connection(ours.detach())
        self.update(folder, version)

    def update(self, folder: Path, version: int) -> None:
        self._call(START_SECONDS, "update", str(folder), version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        return list(self._call(self._serving.seconds, "generate", list(requests), sampling, enough))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def _call(self, seconds: float, method: str, *arguments: Any) -> Any:
        with self._lock:
            assert self._connection is not None
            assert self._process is not None
            try:
                if not self._process.alive:
                    raise EOFError
                self._connection.send((method, arguments))
                if not self._connection.poll(seconds):
                    raise EngineDied(f"It has not answered for {seconds:g} seconds.")
                kind, answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise EngineDied(f"Its process is gone. It said last:\n{self._process.last_words()}") from error
        if kind == "failed":
            raise answer
        return answer


# --- in the engine's process --------------------------------------------------------------------------------


class _Engine:
    """What can be asked for."""

    def __init__(self, dtype: str, concurrency: int) -> None:
        import torch

        openmp.compute_with(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._dtype, self._concurrency = getattr(torch, dtype), concurrency
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def update(self, folder: str, version: int) -> None:
        """Read the weights in a folder."""
        from transformers import AutoModelForCausalLM

        from postlude.rollout.native import NativeEngine

        causal = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        causal.to(self._device)  # type: ignore[arg-type]
        self._native, self._version = NativeEngine(causal, None, self._concurrency), version

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None) -> list[Completion]:
        """As :meth:`postlude.rollout.engine.Engine.generate`."""
        return with_version(self._native.generate(requests, sampling, enough), self._version)


def main() -> None:
    connection, engine = Connection(int(sys.argv[1])), _Engine(sys.argv[2], int(sys.argv[3]))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("done", getattr(engine, method)(*arguments))
        except (UserError, ValueError) as error:
            answer = ("failed", error)
        connection.send(answer)


if __name__ == "__main__":
    main()
