"""An engine apart: a process of its own that is given the policy's weights, and is replaced when it dies.

Notable:

- What an engine that died was answering is asked again, whole, of the one that takes its place: a completion follows
  from its request, so nothing shows that anything happened.
- Weights are written once for each version, into shared memory, and read from there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from postlude.rollout.engine import Completion, EngineLost, Enough, Request, Sampling
from postlude.rollout.serving import EngineChoice, EngineDied, Server, Serving
from postlude.telemetry.progress import waiting

VERSIONS = 3
"""Of the weights that may be there at a time: one that is read, one that waits, one that is written."""
TRIES = 3
"""Engines that may die one after the other without having answered anything in between."""


class ApartEngine:
    """An engine of a chosen kind in a process of its own, beside this one.

    ``publish`` writes the policy's weights, as they now are, into a folder. ``tell`` is told of what happens.
    """

    apart = True

    def __init__(
        self,
        choice: EngineChoice,
        serving: Serving,
        publish: Callable[[Path], None],
        tell: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        self._choice, self._serving, self._publish, self._tell = choice, serving, publish, tell
        self._room: Path | None = None
        self._server: Server | None = None
        self._published = self._has = -1
        """The version that was written last, and the one that the server has."""
        self._deaths = 0
        self._lock = threading.RLock()
        self._closed = False

    @property
    def context(self) -> int | None:
        return self._serving.context

    def update(self, version: int) -> None:
        """Write the weights, which are now those after ``version`` steps. An engine that can take them over in the
        midst of answering does so; another does before it answers the next."""
        if version == self._published:
            return
        if self._room is None:
            place = self._choice.meets(VERSIONS * self._serving.weights)
            self._room = Path(tempfile.mkdtemp(prefix=f"postlude-engine-{os.getpid()}-", dir=place))
        folder = self._folder(version)
        folder.mkdir()
        self._publish(folder)
        with self._lock:
            before, self._published = self._published, version
            if self._has != before:
                shutil.rmtree(self._folder(before), ignore_errors=True)  # nobody has read it
        if self._choice.updates_in_flight or self._server is None:
            self._insist(lambda server: None)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`. :class:`~postlude.rollout.engine.EngineLost` where one
        engine after the other dies."""
        made: list[Completion] = []
        if requests:
            self._insist(lambda server: made.extend(server.generate(requests, sampling, enough)))
        return made

    def close(self) -> None:
        """Leave no process and no file."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()
        if self._room is not None:
            shutil.rmtree(self._room, ignore_errors=True)
            self._room, self._published, self._has = None, -1, -1

    # --- a server that is there -----------------------------------------------------------------------------

    def _insist(self, what: Callable[[Server], None]) -> None:
        """Do something with a server that has the newest weights, and do it again with another where it dies."""
        while True:
            server: Server | None = None
            try:
                server = self._ready()
                what(server)
            except EngineDied as error:
                self._replace(server, error)
            else:
                self._deaths = 0
                return

    def _ready(self) -> Server:
        """A server with the newest weights."""
        with self._lock:
            assert self._room is not None, "weights are given before anything is asked"
            if self._server is None:
                self._server = self._choice.server(self._serving)
                with waiting(f"the engine '{self._choice.component_name}' to start"):
                    self._server.start(self._room, self._folder(self._published), self._published)
            elif self._has != self._published:
                self._server.update(self._folder(self._published), self._published)
            if self._has != self._published:
                shutil.rmtree(self._folder(self._has), ignore_errors=True)
                self._has = self._published
            return self._server

    def _replace(self, server: Server | None, error: EngineDied) -> None:
        """Put away a server that died, unless somebody has."""
        with self._lock:
            if self._closed:
                raise EngineLost("The engine was closed while it answered.") from error
            died = self._server if server is None else server
            if died is None or died is not self._server:
                return
            self._server, self._deaths = None, self._deaths + 1
            died.kill()
            self._tell("engine_died", reason=str(error), engine=self._choice.component_name)
            if self._deaths == TRIES:
                raise EngineLost(
                    f"{TRIES} engines '{self._choice.component_name}' died one after the other. The last: {error}"
                ) from error

    def _folder(self, version: int) -> Path:
        assert self._room is not None
        return self._room / f"version-{version}"
