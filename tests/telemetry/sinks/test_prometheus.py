"""What Prometheus is shown."""

from __future__ import annotations

import pytest

from postlude.telemetry.sinks import prometheus
from postlude.telemetry.sinks.prometheus import Exporter, _OpenPrometheus
from postlude.telemetry.sinks.sink import Description


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """One that does not listen."""
    client = pytest.importorskip("prometheus_client")
    monkeypatch.setattr(client, "start_http_server", lambda *_: None)
    return Exporter("127.0.0.1", 1)


def shown(exporter: Exporter) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sample.labels if name not in ("run", "stage"))): sample.value
        for family in exporter.collect()
        for sample in family.samples
    }


def test_series_are_of_the_stage_and_of_each_worker(exporter: Exporter) -> None:
    sink = _OpenPrometheus(exporter, Description("r", "/r", "sft", 1, None, {}))
    sink.metrics({"step": 1, "time": 1.0, "pass@4": 0.5, "pass/4": 0.25})
    sink.metrics({"step": 2, "time": 2.0, "pass@4": float("nan")})
    for rank in (0, 1):
        phases = {"forward": 0.5 + rank}
        sink.reading({"time": "x", "moment": 1.0, "rank": rank, "host": "a", "resident_bytes": 7, "seconds": phases})
    told = shown(exporter)
    assert str(told.pop(("postlude_metric", "pass@4"))) == "nan"
    assert told == {
        ("postlude_metric", "pass/4"): 0.25,
        ("postlude_metric", "step"): 2,
        ("postlude_worker", "0", "resident_bytes"): 7,
        ("postlude_worker", "1", "resident_bytes"): 7,
        ("postlude_worker", "0", "seconds.forward"): 0.5,
        ("postlude_worker", "1", "seconds.forward"): 1.5,
    }


def test_a_stage_has_no_more_series_than_so_many(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "MOST_METRICS", 3)
    sink = _OpenPrometheus(exporter, Description("r", "/r", "sft", 1, None, {}))
    sink.metrics({"step": 1, "time": 1.0, "a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="more than the 3"):
        sink.metrics({"step": 2, "time": 1.0, "c": 1.0})
    assert len(shown(exporter)) == 3
