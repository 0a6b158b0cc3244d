"""Metrics in trackio's local database, from where ``trackio show`` and ``trackio sync`` take them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from postlude.telemetry.sinks.sink import Artifact, Description, OpenSink, Sink, describe, local_folder
from postlude.telemetry.sinks.vocabulary import Vocabulary

RESERVED = ("project", "run", "timestamp", "step", "time", "metrics")
"""Names that trackio keeps for itself."""


class Trackio(Sink):
    """Writes a run of trackio for each revision of a stage, which is gone on with after a resume."""

    extra = "trackio"
    needs = ("trackio",)

    project: str | None = None
    """By default the name of the run."""
    folder: str | None = None
    """Where its database is; by default where trackio looks for it."""

    def check(self, run_uri: str) -> None:
        super().check(run_uri)
        if self.folder is not None:
            local_folder(self, self.folder, run_uri, "trackio")

    def open(self, run_uri: str, stage: str) -> OpenSink:
        if self.folder is not None:
            os.environ["TRACKIO_DIR"] = os.path.abspath(local_folder(self, self.folder, run_uri, "trackio"))
        stage_of = describe(run_uri, stage)
        return _OpenTrackio(self.project or stage_of.run, stage_of)


class _OpenTrackio(OpenSink):
    def __init__(self, project: str, stage: Description) -> None:
        # Its writer of the database takes steps, times and ids of rows. `init` and `log` have a thread that gives all
        # rows of a batch one time, and no way to learn which of them are there.
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(project)
        self._database, self._project, self._stage = SQLiteStorage, project, stage
        self._vocabulary = Vocabulary(reserved=RESERVED)
        self._id = hashlib.sha256(stage.key.encode()).hexdigest()[:32]
        self._config: dict[str, Any] = {
            "postlude_run": stage.run_uri,
            "postlude_stage": stage.stage,
            "postlude_revision": stage.revision,
            "postlude_fingerprint": stage.fingerprint,
            **stage.config,
        }
        self._rows: list[tuple[dict[str, float], int, str]] = []
        self._last = 0

    def begin(self, after: int) -> int:
        known = self._database.get_run_config(self._project, run_id=self._id) or {}
        self._config = {**known, **self._config}
        self._last = self._database.get_last_step(self._project, run_id=self._id) or 0
        return self._last

    def metrics(self, line: Mapping[str, Any]) -> None:
        time = datetime.fromtimestamp(line["time"], UTC).isoformat()
        self._rows.append((self._vocabulary.numbers(line), line["step"], time))
        self._last = line["step"]

    def artifact(self, artifact: Artifact) -> None:
        self._config |= {"postlude_artifact": artifact.uri, "postlude_artifact_sha256": artifact.sha256}
        self._config |= {"postlude_lineage": artifact.lineage}
        if self._last:  # the configuration comes with a row alone, if it be one that is there already
            self._rows.append(({}, self._last, datetime.now(UTC).isoformat()))
        self.flush()

    def flush(self) -> None:
        """A row that has the id of another is passed over, so nothing goes wrong where this is cut off."""
        if not self._rows:
            return
        numbers, steps, times = map(list, zip(*self._rows, strict=True))
        ids = [f"{self._id}-{step}" for step in steps]
        self._database.bulk_log(
            self._project,
            self._stage.title,
            numbers,
            steps=steps,
            timestamps=times,
            config=self._config,
            log_ids=ids,
            run_id=self._id,
        )
        self._rows.clear()
