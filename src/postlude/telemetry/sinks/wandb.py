"""Metrics, configuration, alarms and lineage in Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from postlude.runs import Run
from postlude.storage import is_encrypted
from postlude.telemetry.events import Alarm, AmendmentApplied, Event
from postlude.telemetry.sinks.sink import Artifact, Description, OpenSink, Sink, describe, local_folder
from postlude.telemetry.sinks.vocabulary import Vocabulary

if TYPE_CHECKING:
    import wandb

WRITING_SECONDS = 10.0
"""How long a process that outlived its own may go on to write what it was given."""
_HEADER_BYTES, _BLOCK_BYTES, _PIECE_BYTES = 7, 2**15, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


class WeightsAndBiases(Sink):
    """Writes a run of W&B for each attempt at a stage, all of one group: a run of theirs cannot be gone on with where
    there is no network."""

    extra = "wandb"
    needs = ("wandb",)

    project: str | None = None
    """By default the name of the run."""
    entity: str | None = None
    """The user or team; by default the user's own."""
    mode: Literal["online", "offline"] | None = None
    """``offline`` writes to a folder, for ``wandb sync``. By default what ``WANDB_MODE`` says."""
    folder: str | None = None
    """Where it writes, online too: in ``wandb`` below this folder; by default in the run directory."""

    def check(self, run_uri: str) -> None:
        super().check(run_uri)
        if self.folder is not None or is_encrypted(run_uri):
            local_folder(self, self.folder, run_uri, "")

    def open(self, run_uri: str, stage: str) -> OpenSink:
        from postlude import storage

        beside = storage.local_path(run_uri) if storage.is_local(run_uri) else Run(run_uri).cache
        folder = os.path.abspath(self.folder or beside)
        os.makedirs(folder, exist_ok=True)
        return _OpenWeightsAndBiases(self, folder, describe(run_uri, stage))


class _OpenWeightsAndBiases(OpenSink):
    def __init__(self, config: WeightsAndBiases, folder: str, stage: Description) -> None:
        self._config, self._folder, self._stage = config, folder, stage
        self._vocabulary = Vocabulary()
        self._key = hashlib.sha256(stage.key.encode()).hexdigest()[:10]
        self._run: wandb.Run | None = None

    def begin(self, after: int) -> int:
        """What was given to the process of W&B's is what it has written, whether that is sent yet or not."""
        logs = [place for folder in self._attempts() for place in folder.glob("*.wandb")]
        _wait_until_written(logs)
        return max((step for log in logs for step in steps_in(log)), default=0)

    def metrics(self, line: Mapping[str, Any]) -> None:
        self._attempt().log({**self._vocabulary.numbers(line), "step": line["step"], "time": line["time"]})

    def event(self, event: Event) -> None:
        match event:
            case AmendmentApplied():
                key = f"amendment at step {event.step}"
                self._attempt().config.update({key: event.assignment}, allow_val_change=True)
            case Alarm():
                self._attempt().alert(title=f"{self._stage.title}: {event.what}", text=event.reason)

    def artifact(self, artifact: Artifact) -> None:
        import wandb

        run, about = self._attempt(), {"sha256": artifact.sha256, "lineage": artifact.lineage}
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self._stage.run}-{self._stage.stage}")
        made = wandb.Artifact(name, type="model", metadata={"uri": artifact.uri, **about})
        uri = artifact.uri if "://" in artifact.uri else Path(os.path.abspath(artifact.uri)).as_uri()
        made.add_reference(uri, checksum=False)
        run.log_artifact(made)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _attempt(self) -> wandb.Run:
        """The run of this attempt, which begins with the first thing that there is to say."""
        if self._run is None:
            import wandb

            number, stage, config = len(self._attempts()) + 1, self._stage, self._config
            about = {"run": stage.run_uri, "revision": stage.revision, "fingerprint": stage.fingerprint}
            self._run = wandb.init(
                project=config.project or stage.run,
                entity=config.entity,
                dir=self._folder,
                id=f"{self._key}-{number}",
                name=f"{stage.title} {number}",
                group=stage.title,
                job_type=stage.stage,
                config={"postlude": about, **stage.parameters},
                mode=config.mode,
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True),
            )
            self._run.define_metric("*", step_metric="step")  # never its own count, which cannot go back
        return self._run

    def _attempts(self) -> list[Path]:
        return [*Path(self._folder, "wandb").glob(f"*run-*-{self._key}-*")]


def steps_in(log: Path) -> Iterator[int]:
    """The steps that a log of W&B's holds, in order."""
    from wandb.proto import wandb_internal_pb2

    for content in _records(log.read_bytes()):
        for item in vars(wandb_internal_pb2)["Record"].FromString(content).history.item:
            if item.key == "step" or [*item.nested_key] == ["step"]:
                yield int(json.loads(item.value_json))


def _records(content: bytes) -> Iterator[bytes]:
    """The records in the log of LevelDB's form that W&B writes. One that is not whole ends them."""
    place, record = _HEADER_BYTES, b""
    while place + _PIECE_BYTES <= len(content):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _PIECE_BYTES:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        begin = place + _PIECE_BYTES
        if not kind or begin + size > len(content):
            return
        record = (b"" if kind in (_WHOLE, _FIRST) else record) + content[begin : begin + size]
        if kind in (_WHOLE, _LAST):
            yield record
        place = begin + size


def _wait_until_written(logs: list[Path]) -> None:
    """Wait until no process writes these any more. W&B's own outlives the one that it works for by a moment."""
    own, deadline = os.getpid(), time.monotonic() + WRITING_SECONDS
    names = {str(log) for log in logs}
    while names and (writers := [each for each in _processes_of_theirs() if each.ppid() != own and _has(each, names)]):
        if time.monotonic() > deadline:
            for writer in writers:
                writer.kill()
        time.sleep(0.1)


def _processes_of_theirs() -> Iterator[psutil.Process]:
    return (process for process in psutil.process_iter(["name"]) if process.info["name"] == "wandb-core")


def _has(process: psutil.Process, names: set[str]) -> bool:
    try:
        return any(file.path in names for file in process.open_files())
    except psutil.Error:
        return False
