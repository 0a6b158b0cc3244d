"""External engines: processes of their own that are given the policy's weights, and are replaced when they die.

Notable:

- What an engine that died was answering is asked again, whole, of the one that takes its place: a completion follows
  from its request, so nothing shows that anything happened.
- How requests are dealt to several engines follows from the requests, so that each gets the same batches again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from postlude.rollout.engine import Completion, Death, EngineLost, Enough, Request, Sampling
from postlude.rollout.serving.server import EngineDied, Server
from postlude.rollout.serving.weight_transfer import WeightTransfer
from postlude.telemetry.progress import waiting
from postlude.telemetry.readings import note_engine

TRIES = 3
"""Engines that may die one after the other without having answered anything in between."""
MOST_THREADS = 64


class Slot:
    """The place of one engine, which another takes when it dies. ``make`` makes one that is not started yet."""

    def __init__(self, name: str, make: Callable[[], Server], transfer: WeightTransfer, number: int = 0) -> None:
        self._called = f"{name} {number}"
        """What readings know the place by, among those that this process asks."""
        self._name, self._make, self._transfer = name, make, transfer
        self.deaths: list[Death] = []
        """Those of which nobody has been told."""
        self._server: Server | None = None
        self._version = -1
        """Of the weights that the server has."""
        self._deaths_in_a_row = 0
        self._lock = threading.RLock()
        self._closed = False

    @property
    def is_empty(self) -> bool:
        return self._server is None

    def renew(self) -> None:
        """Have a server there, with the newest weights."""
        self._insist(lambda server: None)

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None) -> list[Completion]:
        """What a server with the newest weights answers."""
        completions: list[Completion] = []

        def ask(server: Server) -> None:
            begun = time.monotonic()
            completions.extend(server.generate(requests, sampling, enough))
            tokens = sum(len(completion.tokens) for completion in completions)
            note_engine(self._called, self._version, len(requests), tokens, time.monotonic() - begun)

        self._insist(ask)
        return completions

    def close(self) -> None:
        """Leave no process."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _insist(self, act: Callable[[Server], None]) -> None:
        """Do something with a server that has the newest weights, and do it again with another where it dies."""
        while True:
            server: Server | None = None
            try:
                server = self._ready_server()
                act(server)
            except EngineDied as error:
                self._put_away(server, error)
            else:
                self._deaths_in_a_row = 0
                return

    def _ready_server(self) -> Server:
        with self._lock:
            if self._server is not None and self._version == self._transfer.version:
                return self._server
            with self._transfer.newest() as (folder, version):
                if self._server is None:
                    self._server = self._make()
                    with waiting(f"the engine '{self._name}' to start"):
                        self._server.start(self._transfer.room, folder, version)
                else:
                    self._server.update(folder, version)
            self._version = version
            return self._server

    def _put_away(self, server: Server | None, error: EngineDied) -> None:
        """Leave the place to another than a server that died, unless somebody has."""
        with self._lock:
            if self._closed:
                raise EngineLost("The engine was closed while it answered.") from error
            dead = self._server if server is None else server
            if dead is None or dead is not self._server:
                return
            self._server, self._deaths_in_a_row = None, self._deaths_in_a_row + 1
            dead.kill()
            self.deaths.append(Death(self._name, str(error)))
            if self._deaths_in_a_row == TRIES:
                raise EngineLost(
                    f"{TRIES} engines '{self._name}' died one after the other. The last: {error}"
                ) from error


class ExternalEngine:
    """The external engines that this process asks, as one; where it asks none it only gives the weights.

    With ``updates_in_flight`` they take over weights in the midst of answering, else before they answer the next.
    """

    is_external = True

    def __init__(self, slots: Sequence[Slot], transfer: WeightTransfer, context: int, updates_in_flight: bool) -> None:
        self._slots, self._transfer = slots, transfer
        self.context, self._updates_in_flight = context, updates_in_flight
        self._threads = ThreadPoolExecutor(MOST_THREADS, "engines")

    def update(self, version: int) -> None:
        """Give the weights, which are now those after ``version`` steps. All ranks call it."""
        self._transfer.publish(version)
        self._call_all([slot.renew for slot in self._slots if self._updates_in_flight or slot.is_empty])

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`. :class:`~postlude.rollout.engine.EngineLost` where one
        engine after the other dies."""
        completions: dict[int, Completion] = {}

        def ask(slot: Slot, places: Sequence[int], enough: Enough | None) -> None:
            answers = slot.generate([requests[place] for place in places], sampling, enough)
            completions.update(zip(places, answers, strict=True))

        shares = zip(self._slots, deal(requests, enough, len(self._slots)), strict=True)
        self._call_all([partial(ask, slot, *share) for slot, share in shares if share[0]])
        return [completions[place] for place in range(len(requests))]

    def deaths(self) -> list[Death]:
        """The engines that have died since this was last asked."""
        return [slot.deaths.pop(0) for slot in self._slots for _ in range(len(slot.deaths))]

    def close(self) -> None:
        """Leave no process and no file."""
        for slot in self._slots:
            slot.close()
        self._threads.shutdown()
        self._transfer.close()

    def _call_all(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all of these calls at once; raise what one raised when all have ended."""
        if len(calls) == 1:
            calls[0]()
            return
        futures = [self._threads.submit(call) for call in calls]
        wait(futures)
        for future in futures:
            future.result()


def deal(requests: Sequence[Request], enough: Enough | None, shares: int) -> list[tuple[Sequence[int], Enough | None]]:
    """The places of requests, and when enough of them have ended, dealt in so many shares: what is of use only together
    stays together, and so do the completions of a prompt, which share its forward pass."""
    if shares <= 1:
        return [(range(len(requests)), enough)] * shares
    if enough is None:
        prompts: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            prompts.setdefault(request.prompt_id, []).append(place)
        bundles: Sequence[Sequence[int]] = list(prompts.values())
    else:
        bundles = enough.bundles
    dealt: list[tuple[Sequence[int], Enough | None]] = []
    for share in range(shares):
        numbers = range(share, len(bundles), shares)
        places = [place for number in numbers for place in bundles[number]]
        enough_here = None
        if enough is not None:
            index = {place: at for at, place in enumerate(places)}
            enough_here = Enough(
                tuple(tuple(index[place] for place in bundles[number]) for number in numbers),
                math.ceil(enough.needed * len(numbers) / len(bundles)),
                frozenset(at for at, number in enumerate(numbers) if number in enough.must),
            )
        dealt.append((places, enough_here))
    return dealt
