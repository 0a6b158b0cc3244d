"""Six trackers at one run, which is killed three times: in each of them every step stands once, as in the run."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from postlude.runs import Run, artifact_digest

pytestmark = pytest.mark.long

STEPS = 80
KILLED_AT = ((23, 20), (47, 45), (61, 60))
"""The step of each kill, and that of the checkpoint before."""

Series = dict[str, dict[int, float]]
"""Values by metric and step."""


@dataclass
class Tracked:
    """What came of the run, in it and in its trackers."""

    run: Run
    folder: Path
    posted: list[tuple[str, bytes]]
    """What the collector was sent: where, and what."""
    scraped: str
    """What Prometheus got in the last life."""

    @property
    def series(self) -> Series:
        """The values of the run directory."""
        return by_metric(self.run.stage("sft").metrics.read())


def by_metric(rows: list[dict[str, Any]]) -> Series:
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                place = series.setdefault(name, {})
                assert row["step"] not in place, f"{name} stands twice at step {row['step']}"
                place[row["step"]] = float(value)
    return series


@pytest.fixture(scope="module")
def tracked(new_project: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    folder = tmp_path_factory.mktemp("tracked")
    posted: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    project = new_project(folder)
    project.stage |= {"steps": STEPS, "checkpoint": {"every": 5}}
    project.manifest["plugins"] = ["gate"]
    project.manifest["sinks"] = [
        {"name": "tensorboard"},
        {"name": "wandb", "mode": "offline"},
        {"name": "mlflow"},
        {"name": "trackio", "folder": str(folder / "trackio")},
        {"name": "opentelemetry", "endpoint": f"http://127.0.0.1:{collector.server_port}"},
        {"name": "prometheus", "port": port},
    ]
    project.write()
    gate = folder / "gate"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "GATE": str(gate), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "postlude", "run", str(project.path), "--inline"]

    def live(until_step: int, committed: int, out: Any) -> subprocess.Popen[bytes]:
        """Begin a life of the run, and return when all trackers know of this checkpoint."""
        gate.write_text(str(until_step))
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while not all_know(Path(project.run.uri), committed):
            assert process.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < deadline, (folder / "output").read_text()
            time.sleep(0.1)
        return process

    with (folder / "output").open("wb") as out:
        for number, (step, committed) in enumerate(KILLED_AT):
            process = live(step, committed, out)
            if number == 1:  # the process of the trackers alone, too: another takes its place
                child = next(each for each in psutil.Process(process.pid).children() if "sinks" in each.name())
                child.kill()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process = live(76, 75, out)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            scraped = answer.read().decode()
        gate.write_text(str(STEPS + 1))
        assert process.wait(timeout=300) == 0, (folder / "output").read_text()
    yield Tracked(project.run, folder, posted, scraped)
    collector.shutdown()
    collector.server_close()


def all_know(run: Path, step: int) -> bool:
    cursors = [json.loads(place.read_text()) for place in run.glob("sinks/*/sft-1.json")]
    return len(cursors) == 6 and all(cursor["step"] >= step for cursor in cursors)


def test_the_run_itself_has_each_step_once_and_dropped_none(tracked: Tracked) -> None:
    assert list(tracked.series["loss"]) == list(range(1, STEPS + 1))
    kinds = [event["kind"] for event in tracked.run.events.read()]
    assert kinds.count("run_started") == len(KILLED_AT) + 1
    assert not {"steps_dropped", "alarm"} & set(kinds)


@pytest.mark.capability("Metrics in TensorBoard")
def test_tensorboard(tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(f"{tracked.run.uri}/tensorboard/sft", size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    series = tracked.series
    assert set(reader.Tags()["scalars"]) == set(series)
    for name, expected in series.items():
        scalars = reader.Scalars(name)
        assert [scalar.step for scalar in scalars] == list(expected)
        assert [scalar.value for scalar in scalars] == pytest.approx([single(each) for each in expected.values()])
    assert "stage_started/text_summary" in reader.Tags()["tensors"]


def single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.capability("Metrics in Weights & Biases, offline: a run for each attempt, each step in one of them")
def test_weights_and_biases(tracked: Tracked) -> None:
    from wandb.proto import wandb_internal_pb2

    from postlude.telemetry.sinks.wandb import _records

    logs = sorted(Path(tracked.run.uri, "wandb").glob("offline-run-*/*.wandb"), key=lambda log: log.stem)
    assert [log.stem[-2:] for log in logs] == ["-1", "-2", "-3", "-4"]
    rows, groups, artifacts = [], set(), []
    for log in logs:
        for content in _records(log.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]
            if record.run.run_id:
                groups.add(record.run.run_group)
            if record.artifact.name:
                artifacts.append(record.artifact)
            if record.history.item:
                items = [(item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item]
                rows.append({key: json.loads(value) for key, value in items if not key.startswith("_")})
    assert by_metric(rows) == tracked.series
    assert groups == {"small/sft"}
    (artifact,) = artifacts
    assert artifact_digest(tracked.run.stage("sft").artifact) in artifact.metadata


@pytest.mark.capability("Metrics, parameters and lineage in MLflow")
def test_mlflow(tracked: Tracked) -> None:
    with sqlite3.connect(f"{tracked.run.uri}/mlflow.db") as database:
        metrics = database.execute("SELECT key, step, value, run_uuid FROM metrics").fetchall()
        tags = dict(database.execute("SELECT key, value FROM tags").fetchall())
        parameters = dict(database.execute("SELECT key, value FROM params").fetchall())
        (status,) = database.execute("SELECT status FROM runs").fetchone()
    assert len({run for *_, run in metrics}) == 1
    series: Series = {}
    for name, step, value, _ in metrics:
        assert step not in series.setdefault(name, {})
        series[name][step] = value
    assert series.pop("step") == {step: step for step in range(1, STEPS + 1)}
    assert series == tracked.series
    assert parameters["optimizer.lr"] == "0.01"
    assert tags["postlude.artifact_sha256"] == artifact_digest(tracked.run.stage("sft").artifact)
    assert status == "FINISHED"
    assert [*Path(tracked.run.uri, "mlflow").rglob("lineage.json")]


@pytest.mark.capability("Metrics in trackio's database")
def test_trackio(tracked: Tracked) -> None:
    with sqlite3.connect(tracked.folder / "trackio" / "small.db") as database:
        rows = database.execute("SELECT step, metrics, run_name FROM metrics ORDER BY step").fetchall()
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    assert {name for *_, name in rows} == {"small/sft"}
    assert by_metric([{"step": step, **json.loads(metrics)} for step, metrics, _ in rows]) == tracked.series
    assert artifact_digest(tracked.run.stage("sft").artifact) in str(config)
    assert "optimizer" in str(config), "what the manifest says is still there"


@pytest.mark.capability("Metrics, spans of steps and phases, and events as logs over OpenTelemetry's protocol")
def test_opentelemetry(tracked: Tracked) -> None:
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    points: dict[str, dict[int, float]] = {}
    spans, happened = [], []
    for place, content in tracked.posted:
        match place:
            case "/v1/metrics":
                (of_stage,) = ExportMetricsServiceRequest.FromString(content).resource_metrics
                for metric in of_stage.scope_metrics[0].metrics:
                    for point in metric.gauge.data_points:
                        value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
                        of_metric = points.setdefault(metric.name.removeprefix("postlude."), {})
                        assert point.time_unix_nano not in of_metric
                        of_metric[point.time_unix_nano] = value
            case "/v1/traces":
                (of_stage,) = ExportTraceServiceRequest.FromString(content).resource_spans
                spans += of_stage.scope_spans[0].spans
            case "/v1/logs":
                (of_stage,) = ExportLogsServiceRequest.FromString(content).resource_logs
                happened += [record.event_name for record in of_stage.scope_logs[0].log_records]
    steps = points.pop("step")
    assert {name: {steps[at]: value for at, value in series.items()} for name, series in points.items()} == (
        tracked.series
    )
    assert len({span.span_id for span in spans}) == len(spans)
    of_steps = [span for span in spans if span.name == "step"]
    told = [{each.key: each.value for each in span.attributes} for span in of_steps]
    assert {each["step"].int_value: each["loss"].double_value for each in told} == tracked.series["loss"]
    assert len(of_steps) == STEPS
    phases = {span.name for span in spans if span.parent_span_id in {step.span_id for step in of_steps}}
    assert {f"seconds_{phase}" for phase in phases} <= set(tracked.series)
    assert phases
    (whole,) = [span for span in spans if not span.parent_span_id]
    assert artifact_digest(tracked.run.stage("sft").artifact) in str(whole.attributes)
    expected = [event["kind"] for event in tracked.run.events.read() if event.get("stage") == "sft"]
    assert happened == [f"postlude.{kind}" for kind in expected]


@pytest.mark.capability("The newest metrics of each stage for Prometheus")
def test_prometheus(tracked: Tracked) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(tracked.scraped) for sample in family.samples]
    shown = {sample.labels["metric"]: sample.value for sample in samples if sample.name == "postlude_metric"}
    step = int(shown.pop("step"))
    assert step in (75, 76)
    expected = {name: values[max(each for each in values if each <= step)] for name, values in tracked.series.items()}
    assert {name for name, value in shown.items() if not math.isclose(value, expected[name])} == set()
    assert {(sample.labels["run"], sample.labels["stage"]) for sample in samples} == {("small", "sft")}
