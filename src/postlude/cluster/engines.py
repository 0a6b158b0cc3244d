"""Engines in a pool of their own: one actor holds each, and those that train ask it by name.

Notable:

- The controller starts the actors, so that they outlive the workers: when those are formed anew the engines are warm,
  and are given the weights of the checkpoint.
- Ray starts an actor again that is gone, on another node if need be. Until it is back its prompts go to the others.
- Weights go as a path where both are on one node, else through Ray's object store, piece by piece, and with its
  encryption.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from postlude import storage
from postlude.cluster import placement
from postlude.cluster.group import GONE_SECONDS, NAMESPACE, actor_name, actor_options, remove_left_behind
from postlude.cluster.placement import Demand
from postlude.cluster.worker import WorkerSetup
from postlude.errors import ComputeError, UserError
from postlude.processes import die_with_parent
from postlude.rollout.engine import Completion, Enough, Request, Sampling
from postlude.rollout.serving.guardian import Room
from postlude.rollout.serving.server import ADAPTER, EngineChoice, EngineDied, Server, Serving
from postlude.telemetry.progress import waiting

SOURCE = uuid.uuid4().hex
"""This process as a source of weights: what another left under the same version may be others."""
PIECE_BYTES = 32 * 2**20
PIECES_UNDER_WAY = 2
CALL_SECONDS = 60.0
START_SECONDS = 900.0
"""How long an engine may take to be there: to start, or to take over weights."""
HOME_SECONDS = 30.0
"""How long its own host is waited for before the prompts of an engine go to another."""
MOST_CALLS = 64
VERSIONS = 3
STARTED_ANEW = "It has started anew, and has no weights."


# --- where the engine is ------------------------------------------------------------------------------------


class EngineHost:
    """The actor that holds one engine, started when it is first asked for."""

    def __init__(self, setting: WorkerSetup) -> None:
        die_with_parent()
        setting.enter()
        self._server: Server | None = None
        self._weights: tuple[str, int] | None = None
        """The source and the version of its weights."""
        self._serial = 0
        """Which server it is, counted from 1."""
        self._room: Room | None = None
        self._lock, self._making_room = threading.Lock(), threading.Lock()

    def node(self) -> str:
        """Ray's id of the node."""
        return str(ray.get_runtime_context().get_node_id())

    def serves(self) -> bool:
        """Whether it has an engine, which needs only what has changed."""
        return self._server is not None

    def receive(self, key: str, choice: EngineChoice, size: int, name: str, offset: int, piece: np.ndarray) -> None:
        """Keep a piece of a file of weights."""
        place = self._folder(choice, size) / key / name
        place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(file, piece.data, offset)
        finally:
            os.close(file)

    def take(
        self, choice: EngineChoice, serving: Serving, weights: tuple[str, int], folder: str | None, whole: bool
    ) -> int:
        """Have an engine with weights, known by their source and version: its serial number. They are in a folder, or
        were received; all of them, or what has changed. Where they are gone before they are read it stays as it is."""
        place = self._folder(choice, serving.weights) / _key(weights)
        with self._lock:
            if folder is not None:
                _link_all(Path(folder), place)
            try:
                if self._server is None and not whole:
                    raise EngineDied(STARTED_ANEW)
                if self._server is None:
                    choice.check()
                    self._server, self._serial = choice.server(serving), self._serial + 1
                    self._server.start(self._folder(choice, serving.weights), place, weights[1])
                elif self._weights != weights:
                    self._server.update(place, weights[1])
            except BaseException:
                self._end()
                raise
            finally:
                shutil.rmtree(place, ignore_errors=True)
            self._weights = weights
            return self._serial

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None) -> Sequence[Completion]:
        """As :meth:`postlude.rollout.engine.Engine.generate`."""
        if (server := self._server) is None:
            raise EngineDied(STARTED_ANEW)
        return server.generate(requests, sampling, enough)

    def kill(self, serial: int) -> None:
        """Kill the engine, unless it is another by now."""
        with self._lock:
            if serial == self._serial:
                self._end()

    def close(self) -> None:
        """Leave no process and no file."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if self._room is not None:
            self._room.close()

    def _end(self) -> None:
        if self._server is not None:
            self._server.kill()
        self._server = self._weights = None

    def _folder(self, choice: EngineChoice, size: int) -> Path:
        with self._making_room:
            if self._room is None:
                self._room = Room(choice.weights_folder(VERSIONS * size))
            return self._room.path


def _link_all(folder: Path, place: Path) -> None:
    """Have the files of a folder in another as well: an engine that reads them does not die with who wrote them."""
    try:
        shutil.copytree(folder, place, copy_function=storage.link_file)
    except (OSError, shutil.Error, storage.StorageError) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise EngineDied(f"The weights cannot be taken over, and who wrote them may be gone: {error}") from error


def _key(weights: tuple[str, int]) -> str:
    """The folder in which weights are received."""
    return "-".join(map(str, weights))


# --- who asks it --------------------------------------------------------------------------------------------


class HostedServer:
    """The engine of the ``number``-th host as those see it that train; that of another host while it is not there."""

    def __init__(self, hosts: Sequence[str], number: int, choice: EngineChoice, serving: Serving) -> None:
        self._hosts = [*hosts[number:], *hosts[:number]]
        self._choice, self._serving = choice, serving
        self._host: Any = None
        self._is_near = False
        self._serial = 0

    def start(self, room: Path, folder: Path, version: int) -> None:
        self._host = self._find_host()
        self._is_near = self._get("node", seconds=CALL_SECONDS) == ray.get_runtime_context().get_node_id()
        self._give_weights(folder, version, whole=not self._get("serves", seconds=CALL_SECONDS))

    def update(self, folder: Path, version: int) -> None:
        self._give_weights(folder, version, whole=False)

    def _give_weights(self, folder: Path, version: int, whole: bool) -> None:
        """Give the host weights: a folder that it sees, or the files of it that it has not."""
        weights, near = (SOURCE, version), str(folder) if self._is_near else None
        whole = whole or self._is_near or not self._serving.adapter_rank
        if near is None:
            self._send(folder, _key(weights), "" if whole else ADAPTER)
        self._serial = self._get("take", self._choice, self._serving, weights, near, whole, seconds=START_SECONDS)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        seconds = self._serving.seconds + CALL_SECONDS
        return list(self._get("generate", list(requests), sampling, enough, seconds=seconds))

    def kill(self) -> None:
        if self._host is not None:
            with contextlib.suppress(EngineDied):
                self._get("kill", self._serial, seconds=CALL_SECONDS)

    def close(self) -> None:
        """The engine stays for those who come next; the controller ends it."""

    def _find_host(self) -> Any:
        """The first host that answers; for a while only its own."""
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < START_SECONDS:
            for name in self._hosts if waited > HOME_SECONDS else self._hosts[:1]:
                with contextlib.suppress(ValueError, ray.exceptions.RayError):
                    host = ray.get_actor(name, NAMESPACE)
                    ray.get(host.node.remote(), timeout=CALL_SECONDS / 6)
                    return host
            time.sleep(0.2)
        raise EngineDied(f"None of the hosts of engines answers: {', '.join(self._hosts)}.")

    def _send(self, folder: Path, key: str, part: str) -> None:
        """The files of a folder, or of a part of it, piece by piece."""
        under_way: deque[Any] = deque()
        for file in sorted(path for path in folder.joinpath(part).rglob("*") if path.is_file()):
            name = str(file.relative_to(folder))
            content = np.memmap(file, np.uint8, "r")
            for start in range(0, len(content), PIECE_BYTES):
                piece = ray.put(np.asarray(content[start : start + PIECE_BYTES]))
                call = self._host.receive.remote(key, self._choice, self._serving.weights, name, start, piece)
                under_way.append(call)
                if len(under_way) > PIECES_UNDER_WAY:
                    _result(under_way.popleft(), CALL_SECONDS)
        for call in under_way:
            _result(call, CALL_SECONDS)

    def _get(self, method: str, *arguments: Any, seconds: float) -> Any:
        return _result(getattr(self._host, method).remote(*arguments), seconds)


def _result(call: Any, seconds: float) -> Any:
    """What a host answers, or what it raises. EngineDied if it is gone, or does not answer within the time."""
    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EngineDied | UserError | ValueError):
            raise error.cause from None
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise EngineDied(f"The host of the engine has not answered for {seconds:g} seconds.") from error
    except ray.exceptions.RayActorError as error:
        raise EngineDied(f"The host of the engine is gone: {str(error).splitlines()[0]}") from error


# --- the controller -----------------------------------------------------------------------------------------


def host_names(name: str, count: int) -> list[str]:
    """The names of the hosts of engines of a job, by which its workers ask for them."""
    return [actor_name(f"{name}:engines", number) for number in range(count)]


@contextlib.contextmanager
def engine_hosts(
    name: str, demand: Demand, count: int, setting: WorkerSetup, seconds: float, give_up: Callable[[], bool]
) -> Iterator[None]:
    """Hosts of the engines of a job, for as long as the context lasts. ComputeError if there is no room for them within
    ``seconds``."""
    with waiting(f"room for {count} engines of {name}"):
        room = placement.place(demand, count, seconds, give_up)
    if room is None:
        if give_up():
            yield
            return
        raise ComputeError(
            f"There is no room for {count} engines of {name}: each needs {demand}, and there is room for "
            f"{placement.room(demand)} now, on {placement.describe_nodes()}. Free or add nodes and run again."
        )
    actor: Any = ray.remote(EngineHost)
    hosts: list[Any] = []
    try:
        remove_left_behind(f"{name}:engines")
        for number, host_name in enumerate(host_names(name, count)):
            options = {**actor_options(demand), "max_restarts": -1, "max_concurrency": MOST_CALLS}
            placed = actor.options(name=host_name, scheduling_strategy=placement.at(room, number), **options)
            hosts.append(placed.remote(setting))
        yield
    finally:
        closings = [host.close.remote() for host in hosts]
        if closings:
            ray.wait(closings, num_returns=len(closings), timeout=GONE_SECONDS)
        for host in hosts:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(host)
        placement.remove(room)
