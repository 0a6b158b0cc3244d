"""The place of an external engine tells what is answered there, also after a death."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from postlude.rollout.engine import Completion, Request, Sampling
from postlude.rollout.serving.external import Slot
from postlude.rollout.serving.server import EngineDied
from postlude.telemetry import readings


class Weights:
    version, room = 3, None

    @contextmanager
    def newest(self):
        yield None, self.version


class Server:
    """One of ours that answers each request with two tokens, but for the first, which dies."""

    made = 0

    def __init__(self) -> None:
        Server.made += 1
        self.number = Server.made

    def start(self, room, folder, version) -> None: ...

    def update(self, folder, version) -> None: ...

    def kill(self) -> None: ...

    def generate(self, requests, sampling, enough):
        if self.number == 1:
            raise EngineDied("as asked")
        return [Completion(request, (5, 6), (-1.0, -1.0), "stop") for request in requests]


@pytest.mark.capability("Readings tell of each engine what it has answered, with which weights")
def test_a_slot_tells_what_was_answered_there(monkeypatch):
    monkeypatch.setattr(readings, "_engines", {})
    weights = Weights()
    slot = Slot("native", Server, weights, 2)
    ask = [Request("a", (1,)), Request("b", (2,))]
    assert len(slot.generate(ask, Sampling(4, frozenset()), None)) == 2
    weights.version = 4
    slot.generate(ask[:1], Sampling(4, frozenset()), None)
    told = readings.read().engines
    assert told.keys() == {"native 2"}
    assert {key: told["native 2"][key] for key in ("version", "requests", "tokens")} == {
        "version": 4,
        "requests": 3,
        "tokens": 6,
    }
    assert told["native 2"]["seconds"] >= 0
    assert [death.reason for death in slot.deaths] == ["as asked"]
