"""Engines apart: processes of their own that are given the policy's weights, and are replaced when they die.

Notable:

- What an engine that died was answering is asked again, whole, of the one that takes its place: a completion follows
  from its request, so nothing shows that anything happened.
- How requests are dealt to several engines follows from the requests, so that each gets the same batches again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from postlude.rollout.engine import Completion, Death, EngineLost, Enough, Request, Sampling
from postlude.rollout.serving.server import EngineDied, Server
from postlude.rollout.serving.weight_transfer import Handover
from postlude.telemetry.progress import waiting

TRIES = 3
"""Engines that may die one after the other without having answered anything in between."""
MOST_THREADS = 64


class Seat:
    """Where an engine is, and another when it dies. ``make`` makes one that is not started yet."""

    def __init__(self, name: str, make: Callable[[], Server], handover: Handover) -> None:
        self._name, self._make, self._handover = name, make, handover
        self.died: list[Death] = []
        """Those of which nobody has been told."""
        self._server: Server | None = None
        self._has = -1
        """The version that the server has."""
        self._deaths = 0
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
        made: list[Completion] = []
        self._insist(lambda server: made.extend(server.generate(requests, sampling, enough)))
        return made

    def close(self) -> None:
        """Leave no process."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()

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
        with self._lock:
            if self._server is not None and self._has == self._handover.version:
                return self._server
            with self._handover.newest() as (folder, version):
                if self._server is None:
                    self._server = self._make()
                    with waiting(f"the engine '{self._name}' to start"):
                        self._server.start(self._handover.room, folder, version)
                else:
                    self._server.update(folder, version)
            self._has = version
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
            self.died.append(Death(self._name, str(error)))
            if self._deaths == TRIES:
                raise EngineLost(
                    f"{TRIES} engines '{self._name}' died one after the other. The last: {error}"
                ) from error


class ApartEngine:
    """The engines apart that this process asks, as one; where it asks none it only hands the weights over.

    With ``updates_in_flight`` they take over weights in the midst of answering, else before they answer the next.
    """

    apart = True

    def __init__(self, seats: Sequence[Seat], handover: Handover, context: int, updates_in_flight: bool) -> None:
        self._seats, self._handover = seats, handover
        self._context, self._updates_in_flight = context, updates_in_flight
        self._threads = ThreadPoolExecutor(MOST_THREADS, "engines")

    @property
    def context(self) -> int | None:
        return self._context

    def update(self, version: int) -> None:
        """Hand over the weights, which are now those after ``version`` steps. All ranks call it."""
        self._handover.publish(version)
        late = [one for one in self._seats if self._updates_in_flight or one.is_empty]
        self._together([one.renew for one in late])

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """See :meth:`postlude.rollout.engine.Engine.generate`. :class:`~postlude.rollout.engine.EngineLost` where one
        engine after the other dies."""
        made: dict[int, Completion] = {}

        def ask(seat: Seat, places: Sequence[int], enough: Enough | None) -> None:
            asked = [requests[place] for place in places]
            made.update(zip(places, seat.generate(asked, sampling, enough), strict=True))

        shares = zip(self._seats, dealt(requests, enough, len(self._seats)), strict=True)
        self._together([lambda seat=seat, of=of: ask(seat, *of) for seat, of in shares if of[0]])  # type: ignore[misc]
        return [made[place] for place in range(len(requests))]

    def deaths(self) -> list[Death]:
        """The engines that have died since this was last asked."""
        found = []
        for seat in self._seats:
            while seat.died:
                found.append(seat.died.pop(0))
        return found

    def close(self) -> None:
        """Leave no process and no file."""
        for seat in self._seats:
            seat.close()
        self._threads.shutdown()
        self._handover.close()

    def _together(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all of these calls at once; raise what one raised when all have ended."""
        if len(calls) == 1:
            calls[0]()
            return
        asked = [self._threads.submit(call) for call in calls]
        wait(asked)
        for one in asked:
            one.result()


def dealt(requests: Sequence[Request], enough: Enough | None, shares: int) -> list[tuple[Sequence[int], Enough | None]]:
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
    found: list[tuple[Sequence[int], Enough | None]] = []
    for share in range(shares):
        numbers = range(share, len(bundles), shares)
        places = [place for number in numbers for place in bundles[number]]
        part = None
        if enough is not None:
            index = {place: at for at, place in enumerate(places)}
            part = Enough(
                tuple(tuple(index[place] for place in bundles[number]) for number in numbers),
                math.ceil(enough.needed * len(numbers) / len(bundles)),
                frozenset(at for at, number in enumerate(numbers) if number in enough.must),
            )
        found.append((places, part))
    return found
