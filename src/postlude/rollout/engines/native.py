"""The engine ``native``: the policy's own forward pass, where it is trained or in a process of its own."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.serving.server import EngineChoice, EngineDied, Process, Server, Serving

START_SECONDS = 300.0


class Native(EngineChoice):
    """Any model that transformers knows, through its own forward pass."""

    apart: bool = False
    """Whether it is a process of its own beside each worker, with its own copy of the weights, so that it can answer
    while the worker trains."""

    @property
    def is_apart(self) -> bool:
        return self.apart

    def server(self, serving: Serving) -> Server:
        return NativeServer(serving)


class NativeServer:
    """A process with a :class:`~postlude.rollout.native.NativeEngine`. One call at a time: the others wait."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._process: Process | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def start(self, room: Path, folder: Path, version: int) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "postlude.rollout.serving.native_server", str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._serving.threads)}
        self._process = Process(room, command, environment, theirs.fileno())
        theirs.close()
        self._connection = Connection(ours.detach())
        self._ask(START_SECONDS, "start", str(folder), version, self._serving.dtype, self._serving.concurrency)

    def update(self, folder: Path, version: int) -> None:
        self._ask(START_SECONDS, "update", str(folder), version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        return list(self._ask(self._serving.seconds, "generate", list(requests), sampling, enough))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def _ask(self, seconds: float, what: str, *arguments: Any) -> Any:
        with self._lock:
            assert self._connection is not None
            assert self._process is not None
            try:
                if not self._process.alive:
                    raise EOFError
                self._connection.send((what, arguments))
                if not self._connection.poll(seconds):
                    raise EngineDied(f"It has not answered for {seconds:g} seconds.")
                kind, answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise EngineDied(f"Its process is gone. It said last:\n{self._process.last_words()}") from error
        if kind == "failed":
            raise answer
        return answer
