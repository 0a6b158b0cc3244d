"""Metrics and events in TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.telemetry.events import Event
from postlude.telemetry.sinks.sink import OpenSink, Sink, local_folder
from postlude.telemetry.sinks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoard(Sink):
    """Writes what ``tensorboard --logdir FOLDER`` reads, a run of its own for each stage."""

    extra = "tensorboard"
    needs = ("tensorboard",)

    folder: str | None = None
    """A local folder; by default ``tensorboard`` in the run directory."""

    def check(self, run_uri: str) -> None:
        super().check(run_uri)
        local_folder(self, self.folder, run_uri, "tensorboard")

    def open(self, run_uri: str, stage: str) -> OpenSink:
        return _OpenTensorBoard(storage.join(local_folder(self, self.folder, run_uri, "tensorboard"), stage))


class _OpenTensorBoard(OpenSink):
    goes_back = True

    def __init__(self, folder: str) -> None:
        self._folder, self._vocabulary = folder, Vocabulary()
        self._writer: EventFileWriter | None = None

    def begin(self, after: int) -> int:
        """A new file, which hides what the ones before it say of later steps."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close()
        self._writer = EventFileWriter(self._folder)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=after + 1, session_log=start))
        return after

    def metrics(self, line: Mapping[str, Any]) -> None:
        numbers = self._vocabulary.numbers(line)
        values = [{"tag": name, "simple_value": float(value)} for name, value in numbers.items()]
        self._write(line["step"], line["time"], values)

    def event(self, event: Event) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        fields = event.model_dump(exclude_none=True, exclude={"time", "kind", "stage"})
        text = ", ".join(f"{key}: {value}" for key, value in fields.items()) or event.kind
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = {"tag": f"{event.kind}/text_summary", "metadata": metadata, "tensor": tensor}
        self._write(getattr(event, "step", None) or 0, event.moment, [value])

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, step: int, seconds: float, values: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer is not None
        summary = Summary(value=[Summary.Value(**value) for value in values])
        self._writer.add_event(Record(wall_time=seconds, step=step, summary=summary))
