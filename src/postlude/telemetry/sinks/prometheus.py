"""The newest metrics of each stage, for Prometheus to fetch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from postlude.telemetry.events import Event
from postlude.telemetry.sinks.sink import Artifact, Description, OpenSink, Sink, describe, numbers_of
from postlude.telemetry.sinks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from prometheus_client.core import Metric

MOST_METRICS = 1000
"""Of one stage: so many series, and no more."""

_exporters: dict[tuple[str, int], Exporter] = {}
"""One for each address, of all stages in this process."""


class Prometheus(Sink):
    """Answers at ``http://ADDRESS:PORT/metrics`` while the run is at work. Whoever reaches the address may read."""

    extra = "prometheus"
    needs = ("prometheus_client",)

    port: Annotated[int, Field(gt=0, lt=2**16)] = 9464
    """Each run on a machine needs its own."""
    address: str = "127.0.0.1"
    """Where it listens."""

    def open(self, run_uri: str, stage: str) -> OpenSink:
        place = self.address, self.port
        if place not in _exporters:
            _exporters[place] = Exporter(*place)
        return _OpenPrometheus(_exporters[place], describe(run_uri, stage))


class _OpenPrometheus(OpenSink):
    goes_back = True  # the newest value stands in the place of those before

    def __init__(self, exporter: Exporter, stage: Description) -> None:
        self._exporter, self._stage = exporter, stage
        self._vocabulary = Vocabulary()

    def metrics(self, line: Mapping[str, Any]) -> None:
        self._exporter.show(self._stage, {**self._vocabulary.numbers(line), "step": line["step"]})

    def event(self, event: Event) -> None:
        self._exporter.count(self._stage, event.kind)

    def reading(self, line: Mapping[str, Any]) -> None:
        self._exporter.show_worker(self._stage, line["rank"], numbers_of(line))

    def artifact(self, artifact: Artifact) -> None:
        self._exporter.name_artifact(self._stage, artifact)


class Exporter:
    """Keeps what is shown, and answers. The name of a metric is a label, where any text may stand: as a name of
    Prometheus' own two different ones could become the same."""

    def __init__(self, address: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._turn = threading.Lock()
        self._numbers: dict[tuple[str, str], dict[str, float]] = {}
        self._workers: dict[tuple[str, str], dict[int, Mapping[str, float]]] = {}
        self._events: dict[tuple[str, str], dict[str, int]] = {}
        self._artifacts: dict[tuple[str, str], Artifact] = {}
        registry = CollectorRegistry()
        registry.register(self)
        start_http_server(port, address, registry)

    def show(self, stage: Description, numbers: Mapping[str, float]) -> None:
        """Have these stand, and of others what stood. ValueError if they are more than a scrape should hold."""
        with self._turn:
            shown = {**self._numbers.get((stage.run, stage.stage), {}), **numbers}
            if len(shown) > MOST_METRICS:
                raise ValueError(
                    f"{len(shown)} metrics are more than the {MOST_METRICS} that Prometheus gets of a stage"
                )
            self._numbers[stage.run, stage.stage] = shown

    def show_worker(self, stage: Description, rank: int, numbers: Mapping[str, float]) -> None:
        """Have these stand of one worker."""
        with self._turn:
            self._workers.setdefault((stage.run, stage.stage), {})[rank] = numbers

    def count(self, stage: Description, kind: str) -> None:
        """Note that something happened."""
        with self._turn:
            counts = self._events.setdefault((stage.run, stage.stage), {})
            counts[kind] = counts.get(kind, 0) + 1

    def name_artifact(self, stage: Description, artifact: Artifact) -> None:
        """Tell what a stage has made."""
        with self._turn:
            self._artifacts[stage.run, stage.stage] = artifact

    def describe(self) -> list[Metric]:
        """For the registry: names are free."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What stands now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        metrics = GaugeMetricFamily("postlude_metric", "The newest step.", labels=["run", "stage", "metric"])
        labels = ["run", "stage", "rank", "metric"]
        workers = GaugeMetricFamily("postlude_worker", "The newest reading of a worker.", labels=labels)
        events = CounterMetricFamily("postlude_events", "What happened.", labels=["run", "stage", "kind"])
        made = GaugeMetricFamily("postlude_artifact", "What was made.", labels=["run", "stage", "uri", "sha256"])
        with self._turn:
            for place, numbers in self._numbers.items():
                for name, value in numbers.items():
                    metrics.add_metric([*place, name], value)
            for place, readings in self._workers.items():
                for rank, reading in readings.items():
                    for name, value in reading.items():
                        workers.add_metric([*place, str(rank), name], value)
            for place, counts in self._events.items():
                for kind, count in counts.items():
                    events.add_metric([*place, kind], count)
            for place, artifact in self._artifacts.items():
                made.add_metric([*place, artifact.uri, artifact.sha256], 1)
        yield from (metrics, workers, events, made)
