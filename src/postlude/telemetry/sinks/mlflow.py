"""Metrics, parameters and lineage in MLflow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.telemetry.events import AmendmentApplied, Event, StageFinished
from postlude.telemetry.sinks.sink import Artifact, Description, OpenSink, Sink, describe, local_folder
from postlude.telemetry.sinks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mlflow import MlflowClient

REFUSED = r"[^A-Za-z0-9_\-. :/]|(?:^|(?<=[/.]))[/.]|[/.]$"
"""In names: what is no such character, and what would make of a name another path."""
MOST_METRICS, MOST_PARAMETERS, LONGEST_PARAMETER = 1000, 100, 6000
"""Of one request, and of one value."""
_ID = "postlude.id"


class MLflow(Sink):
    """Writes a run of MLflow for each revision of a stage, which is gone on with after a resume."""

    extra = "mlflow"
    needs = ("mlflow", "sqlalchemy", "alembic")

    tracking_uri: str | None = None
    """The address of a server, or ``sqlite:///FILE``; by default ``mlflow.db`` in the run directory."""
    experiment: str | None = None
    """By default the name of the run."""

    def check(self, run_uri: str) -> None:
        super().check(run_uri)
        if self.tracking_uri is None:
            self._database(run_uri)

    def open(self, run_uri: str, stage: str) -> OpenSink:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # else one call tries for a quarter of an hour
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient

        files = None
        if self.tracking_uri is None:
            files = storage.join(storage.local_path(run_uri), "mlflow")
        place = self.tracking_uri or self._database(run_uri)
        stage_of = describe(run_uri, stage)
        return _OpenMLflow(MlflowClient(place), self.experiment or stage_of.run, files, stage_of)

    def _database(self, run_uri: str) -> str:
        path = local_folder(self, None, run_uri, "mlflow.db", "tracking_uri")
        return f"sqlite:///{os.path.abspath(path)}"


class _OpenMLflow(OpenSink):
    def __init__(self, client: MlflowClient, experiment: str, files: str | None, stage: Description) -> None:
        self._client, self._stage = client, stage
        self._vocabulary = Vocabulary(REFUSED, finite=True, longest=250)
        self._waiting: list[Any] = []
        known = client.get_experiment_by_name(experiment)
        location = os.path.abspath(files) if files else None
        number = known.experiment_id if known else client.create_experiment(experiment, location)
        digest = hashlib.sha256(stage.key.encode()).hexdigest()[:16]
        found = client.search_runs([number], f"tags.`{_ID}` = '{digest}'", max_results=1)
        tags = {
            _ID: digest,
            "postlude.run": stage.run_uri,
            "postlude.stage": stage.stage,
            "postlude.revision": str(stage.revision),
            "postlude.fingerprint": stage.fingerprint or "",
        }
        self._run = found[0] if found else client.create_run(number, tags=tags, run_name=stage.title)
        self._id = self._run.info.run_id

    def begin(self, after: int) -> int:
        """The last step is a metric of its own, told last."""
        from mlflow.entities import Param

        self._client.update_run(self._id, status="RUNNING")
        known = self._run.data.params  # a parameter cannot change
        parameters = [
            Param(self._vocabulary.name(key), str(value)[:LONGEST_PARAMETER])
            for key, value in self._stage.parameters.items()
            if self._vocabulary.name(key) not in known
        ]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])
        return int(self._run.data.metrics.get("step", 0))

    def metrics(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        step, milliseconds = line["step"], round(1000 * line["time"])
        numbers = {**self._vocabulary.numbers(line), "step": step}
        self._waiting += [Metric(name, float(value), milliseconds, step) for name, value in numbers.items()]

    def event(self, event: Event) -> None:
        match event:
            case AmendmentApplied():
                key = event.assignment.partition("=")[0]
                name = self._vocabulary.name(f"postlude.amendment.{event.step}.{key}")
                self._client.set_tag(self._id, name, event.assignment)
            case StageFinished():
                self.flush()
                self._client.set_terminated(self._id, "FINISHED", round(1000 * event.moment))

    def artifact(self, artifact: Artifact) -> None:
        self._client.set_tag(self._id, "postlude.artifact", artifact.uri)
        self._client.set_tag(self._id, "postlude.artifact_sha256", artifact.sha256)
        self._client.log_dict(self._id, dict(artifact.lineage), "lineage.json")

    def flush(self) -> None:
        """The same points again change nothing in MLflow, so nothing goes wrong where this is cut off."""
        while self._waiting:
            self._client.log_batch(self._id, self._waiting[:MOST_METRICS])
            del self._waiting[:MOST_METRICS]
