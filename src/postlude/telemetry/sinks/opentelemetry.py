"""Metrics, spans and logs for any collector that speaks OTLP over HTTP.

The messages are made here, without OpenTelemetry's SDK: that drops numbers that are not finite, shows the last one on
and on, gives a point the time at which it is sent, and waits longer than it is told to for a collector that is away.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from postlude.telemetry.events import Event
from postlude.telemetry.sinks.sink import Artifact, Description, OpenSink, Sink, describe, numbers_of
from postlude.telemetry.sinks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from google.protobuf.message import Message

DEFAULT_ENDPOINT = "http://localhost:4318"
_SEVERITY = {"alarm": (13, "WARN"), "worker_failure": (13, "WARN"), "failure": (17, "ERROR")}
_INTERNAL = 1
"""The kind of a span that is of no request."""


class OpenTelemetry(Sink):
    """Sends metrics, a span for each step and each phase of it, and events as logs.

    Headers, such as those with a key, come from the variable ``OTEL_EXPORTER_OTLP_HEADERS``.
    """

    extra = "opentelemetry"
    needs = ("opentelemetry.proto",)

    endpoint: str | None = None
    """The address of a collector; by default what ``OTEL_EXPORTER_OTLP_ENDPOINT`` says, or port 4318 of this
    machine."""
    deadline_seconds: float = 10.0
    """How long one request may take."""

    def open(self, run_uri: str, stage: str) -> OpenSink:
        endpoint = self.endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or DEFAULT_ENDPOINT
        return _OpenTelemetry(endpoint.rstrip("/"), self.deadline_seconds, describe(run_uri, stage))


class _OpenTelemetry(OpenSink):
    def __init__(self, endpoint: str, seconds: float, stage: Description) -> None:
        self._endpoint, self._seconds, self._stage = endpoint, seconds, stage
        self._vocabulary = Vocabulary(r"[^A-Za-z0-9_.\-/]", finite=True, longest=240)
        given = (part.partition("=") for part in os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(",") if part)
        self._headers = {name.strip(): unquote(value.strip()) for name, _, value in given}
        self._trace = hashlib.sha256(stage.key.encode()).digest()[:16]
        self._points: dict[str, list[dict[str, Any]]] = {}
        self._spans: list[dict[str, Any]] = []
        self._records: list[dict[str, Any]] = []
        self._begun: float | None = None
        self._ended = 0.0

    def metrics(self, line: Mapping[str, Any]) -> None:
        end, step, numbers = line["time"], line["step"], self._vocabulary.numbers(line)
        for name, value in {**numbers, "step": step}.items():
            self._point(name, end, value)
        begin = end - (line.get("seconds") or 0.0)
        attributes = {"step": step, **numbers}
        self._spans.append(self._span("step", begin, end, attributes, f"step {step}", parent="stage"))
        for phase, seconds in _phases(line):  # of which it is known how long they took, not when
            of_phase = self._span(phase, begin, begin + seconds, {"step": step}, f"{phase} {step}", f"step {step}")
            self._spans.append(of_phase)
            begin += seconds

    def event(self, event: Event) -> None:
        if event.kind == "stage_started" and self._begun is None:
            self._begun = event.moment
        self._ended = event.moment
        number, severity = _SEVERITY.get(event.kind, (9, "INFO"))
        fields = event.model_dump(mode="json", exclude_none=True, exclude={"time", "kind", "stage"})
        self._records.append(
            {
                "time_unix_nano": _nano(event.moment),
                "severity_number": number,
                "severity_text": severity,
                "event_name": f"postlude.{event.kind}",
                "body": {"string_value": str(fields.get("reason") or fields.get("error") or event.kind)},
                "attributes": _attributes(fields),
            }
        )

    def reading(self, line: Mapping[str, Any]) -> None:
        about = {"rank": line["rank"], "host": line["host"]}
        for name, value in self._vocabulary.numbers(numbers_of(line)).items():
            self._point(f"worker.{name}", line["moment"], value, about)

    def artifact(self, artifact: Artifact) -> None:
        """The span of the stage as a whole, which names what it has made and what that comes from."""
        parents = [str(parent.get("artifact_sha256")) for parent in artifact.lineage.get("parents", [])]
        attributes = {"artifact": artifact.uri, "artifact_sha256": artifact.sha256, "parents": ",".join(parents)}
        begun = self._ended if self._begun is None else self._begun
        self._spans.append(self._span(f"stage {self._stage.stage}", begun, self._ended, attributes, "stage"))

    def flush(self) -> None:
        """What is cut off is sent again, as the same points at the same times, and spans of the same numbers."""
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        stage = self._stage
        about: dict[str, Any] = {"service.name": "postlude", "postlude.run": stage.run, "postlude.stage": stage.stage}
        about |= {"postlude.run_uri": stage.run_uri, "postlude.revision": stage.revision}
        resource: Any = {"attributes": _attributes(about)}
        scope = {"name": "postlude"}
        metrics = [{"name": name, "gauge": {"data_points": points}} for name, points in self._points.items()]
        whole: Any = {"resource": resource, "scope_metrics": [{"scope": scope, "metrics": metrics}]}
        self._post("metrics", ExportMetricsServiceRequest(resource_metrics=[whole]), self._points)
        whole = {"resource": resource, "scope_spans": [{"scope": scope, "spans": self._spans}]}
        self._post("traces", ExportTraceServiceRequest(resource_spans=[whole]), self._spans)
        whole = {"resource": resource, "scope_logs": [{"scope": scope, "log_records": self._records}]}
        self._post("logs", ExportLogsServiceRequest(resource_logs=[whole]), self._records)

    def _point(self, name: str, at: float, value: float, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        kind = "as_int" if isinstance(value, int) and abs(value) < 2**63 else "as_double"
        point = {"time_unix_nano": _nano(at), kind: value, "attributes": _attributes(about)}
        self._points.setdefault(f"postlude.{name}", []).append(point)

    def _span(
        self, name: str, begin: float, end: float, attributes: Mapping[str, Any], own: str, parent: str | None = None
    ) -> dict[str, Any]:
        return {
            "trace_id": self._trace,
            "span_id": self._number(own),
            "parent_span_id": self._number(parent) if parent else b"",
            "name": name,
            "kind": _INTERNAL,
            "start_time_unix_nano": _nano(begin),
            "end_time_unix_nano": _nano(end),
            "attributes": _attributes(attributes),
        }

    def _number(self, what: str) -> bytes:
        return hashlib.sha256(self._trace + what.encode()).digest()[:8]

    def _post(self, what: str, message: Message, waiting: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Send what waits, if anything does; then it waits no more."""
        if waiting:
            headers = {"Content-Type": "application/x-protobuf", "User-Agent": "postlude", **self._headers}
            request = urllib.request.Request(f"{self._endpoint}/v1/{what}", message.SerializeToString(), headers)
            with urllib.request.urlopen(request, timeout=self._seconds):
                waiting.clear()


def _phases(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name.startswith("seconds_") and isinstance(value, int | float) and value > 0:
            yield name.removeprefix("seconds_"), float(value)


def _attributes(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in fields.items() if value is not None]


def _value(value: Any) -> dict[str, Any]:
    match value:
        case bool():
            return {"bool_value": value}
        case int() if abs(value) < 2**63:
            return {"int_value": value}
        case int() | float():
            return {"double_value": float(value)}
        case Mapping():
            return {"kvlist_value": {"values": _attributes(value)}}
        case Sequence() if not isinstance(value, str):
            return {"array_value": {"values": [_value(each) for each in value]}}
    return {"string_value": str(value)}


def _nano(seconds: float) -> int:
    return round(seconds * 1e6) * 1000
