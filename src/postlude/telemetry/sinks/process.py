"""The process of the sinks of a run: it follows the run directory, and tells each sink of each stage.

It ends when its standard input does, or at once with the process that started it; what it prints is shown there. It
says nothing to the run but how far each sink is, and in the events what failed and what was dropped.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from postlude import secrecy, storage
from postlude.processes import die_with_parent, take_name
from postlude.runs import Run
from postlude.storage import rules
from postlude.telemetry import events
from postlude.telemetry.alarms import since_begun
from postlude.telemetry.sinks.delivery import Delivery, news_of
from postlude.telemetry.sinks.sink import Sink

CLOSING_SECONDS = 20.0
"""What the sinks have at the end of a run to take what is left."""
STUCK_SECONDS = 60.0
"""A sink that takes longer is told of."""


@dataclass(frozen=True)
class Order:
    """What the process is to do."""

    run_uri: str
    parent: int
    sinks: Mapping[str, Sink]
    """By the names that they are called."""
    trains: Mapping[str, bool]
    """The stages, and whether they train: then a resume takes steps back."""
    secrets: Any
    """Plain data that hold secrets, as a manifest does."""
    environment: Mapping[str, str]
    """Variables that it has besides."""
    guard: storage.Guard | None
    closing_seconds: float = CLOSING_SECONDS
    rules: tuple[rules.Rule, ...] = field(default_factory=rules.current)
    """What places need, by default as in the process that makes the order."""


class Follower:
    """Reads what is added to the events of a run, and lets each sink of each stage know."""

    def __init__(self, order: Order) -> None:
        self._order, self._run = order, Run(order.run_uri)
        self._read = storage.Entries(self._run.events)
        self._happened: list[events.Event] = []
        self._deliveries: dict[tuple[str, int, str], Delivery] = {}
        self._stuck: set[tuple[str, int, str]] = set()

    def look(self) -> None:
        """Read, and let know."""
        kept, happened = self._read.update(), self._happened
        happened[kept:] = events.typed(self._run.events, self._read.entries[kept:], kept + 1)
        for stage, trains in self._order.trains.items():
            of_stage = since_begun(happened, stage)
            if not any(isinstance(event, events.StageStarted | events.StageTakenOver) for event in of_stage):
                continue
            revision = 1 + max(
                (each.revision for each in happened if isinstance(each, events.StageSetAside) and each.stage == stage),
                default=0,
            )
            self._end_earlier(stage, revision)
            for name, sink in self._order.sinks.items():
                place = stage, revision, name
                if place not in self._deliveries:
                    self._deliveries[place] = Delivery(self._run.uri, stage, revision, name, sink)
                self._deliveries[place].tell(news_of(of_stage, trains))
        self._tell_stuck()

    def close(self) -> None:
        """Give the sinks their time, and tell what they did not take in it."""
        until = time.monotonic() + self._order.closing_seconds
        for delivery in self._deliveries.values():
            delivery.close()
        for delivery in self._deliveries.values():
            delivery.join(max(0.0, until - time.monotonic()))
        for delivery in self._deliveries.values():
            self._tell_untold(delivery)

    def _end_earlier(self, stage: str, revision: int) -> None:
        """What a stage was before it began anew stands elsewhere now."""
        for place in [each for each in self._deliveries if each[0] == stage and each[1] < revision]:
            self._deliveries.pop(place).close()

    def _tell_stuck(self) -> None:
        for place, delivery in self._deliveries.items():
            since = delivery.at_work_since
            if since is not None and time.monotonic() - since > STUCK_SECONDS and place not in self._stuck:
                self._stuck.add(place)
                delivery.alarm(
                    f"sink '{delivery.name}' hangs",
                    f"it has not come back for {STUCK_SECONDS:g} seconds. The run goes on; what the sink has not taken "
                    "at its end is counted there",
                )

    def _tell_untold(self, delivery: Delivery) -> None:
        with suppress(storage.StorageError, OSError):
            if count := delivery.untold():
                seconds = self._order.closing_seconds
                reason = delivery.failed or f"it took longer than {seconds:g} seconds at the end"
                fields = {"sink": delivery.name, "count": count, "reason": reason}
                events.record(self._run.events, "steps_dropped", delivery.stage.name, **fields)


def main() -> None:
    """Follow the run that standard input names, until that ends."""
    path, content = pickle.load(sys.stdin.buffer)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    order: Order = pickle.loads(content)  # which imports the packages of the sinks
    die_with_parent(order.parent)
    take_name("postlude-sinks")
    os.environ.update(order.environment)
    secrecy.name_to_children(order.environment)
    secrecy.learn_from(order.secrets)
    rules.use(order.rules)
    with suppress(OSError):
        os.nice(10)  # the work itself comes first
    over = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    seconds = 1.0 if storage.is_local(order.run_uri) else 10.0
    code = 0
    with storage.guarded(order.run_uri, order.guard):
        follower = Follower(order)
        try:
            while not over.wait(seconds):
                follower.look()
            follower.look()
            follower.close()
        except (storage.StorageError, OSError) as error:  # the run itself meets it, too
            print(f"no sink is told any more: {error}", file=sys.stderr)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a sink that hangs, and what libraries do at the end, keep nobody waiting


if __name__ == "__main__":
    main()
