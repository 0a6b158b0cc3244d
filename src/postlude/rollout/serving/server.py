"""What a server is, an engine in another process, and how a manifest chooses what answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from postlude.manifest.component import Component
from postlude.rollout.engine import Completion, Enough, Request, Sampling

SHARED_MEMORY = Path("/dev/shm")
"""Where weights are put for engines to read: files that never touch a disk."""
ADAPTER = "adapter"
"""The folder of an adapter that comes by itself, beside the weights of its base."""


class EngineDied(Exception):
    """The process of an engine is gone, or it answers no more. Another may take its place."""


@dataclass(frozen=True)
class Serving:
    """What an engine is to serve."""

    context: int
    """Tokens that a prompt and its completion have together, at most."""
    concurrency: int
    """Completions that are made at a time."""
    weights: int
    """Bytes of the model."""
    dtype: str
    """In which the weights are held: ``float32``, ``bfloat16`` or ``float16``."""
    seconds: float
    """How long one completion may take before the engine counts as hung."""
    adapter_rank: int = 0
    """Of an adapter that comes by itself, beside the base that it belongs to; 0 where the weights come whole."""
    threads: int = 1
    """Threads of the engine on a CPU."""
    gpus: float = 0
    """Devices that it has; 0 computes on the CPU."""


class Server(Protocol):
    """An engine in another process. Each method raises :class:`EngineDied` where that is gone."""

    def start(self, room: Path, folder: Path, version: int) -> None:
        """Start it with the model in a folder: configuration and safetensors, and beside them an adapter that comes by
        itself. Returns when it answers. ``room`` is a folder for what it writes, which is gone once it is, or
        this process is."""

    def update(self, folder: Path, version: int) -> None:
        """Have it take over the weights in a folder; what it is answering goes on with them."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """As :meth:`postlude.rollout.engine.Engine.generate`."""

    def kill(self) -> None:
        """Leave no process; the room stays."""

    def close(self) -> None:
        """Leave no process and no room."""


class EngineChoice(Component):
    """What answers the prompts. The component of the kind ``engines``."""

    updates_in_flight: ClassVar[bool] = False
    """Whether it takes over weights in the midst of answering."""

    @property
    def is_external(self) -> bool:
        """Whether it works in a process of its own; else it is the policy in the process that trains it."""
        return True

    @property
    def runs_already(self) -> bool:
        """Whether it is a server that others have started."""
        return False

    @property
    def is_asked_in_clear_text(self) -> bool:
        """Whether what is said to it crosses the network, with nothing of ours that encrypts it."""
        return False

    def takes_adapter(self, rank: int, dora: bool) -> bool:
        """Whether it can be given such an adapter by itself; else it gets the base with that merged into it."""
        return False

    def objection(self, top_p: float, ahead: int) -> str | None:
        """Why it cannot sample so, or answer so many rounds while one is trained, if it cannot."""
        return None

    def check(self) -> None:
        """:class:`~postlude.errors.ComputeError` if it is not there, where the stage runs."""

    def server(self, serving: Serving) -> Server:
        """One that is not started yet."""
        raise NotImplementedError

    def weights_folder(self, size_bytes: int) -> Path:
        """The folder in which a room is made for weights, of so many bytes at once."""
        if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > size_bytes:
            return SHARED_MEMORY
        return Path(tempfile.gettempdir())  # the shared memory of a container may be small
