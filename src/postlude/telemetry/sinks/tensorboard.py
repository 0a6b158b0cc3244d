"""Metrics and events in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.errors import UserError
from postlude.telemetry.events import Event
from postlude.telemetry.sinks.sink import OpenSink, Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Sink):
    """Writes what ``tensorboard --logdir FOLDER`` reads, a run of its own for each stage."""

    folder: str | None = None
    """A local folder; by default ``tensorboard`` in the run directory."""

    def open(self, run_uri: str, stage: str) -> OpenSink:
        folder = self.folder or storage.join(run_uri, "tensorboard")
        if not storage.is_local(folder):
            raise UserError(
                f"The sink 'tensorboard' adds to files and cannot write to '{folder}'. "
                "Give its key 'folder' a local path."
            )
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                "The sink 'tensorboard' needs a package that is not installed here. "
                "Install it with: pip install 'postlude[tensorboard]'."
            ) from error
        return _OpenTensorBoard(storage.local_path(storage.join(folder, stage)))


class _OpenTensorBoard(OpenSink):
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def metrics(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writing_from(step).add_scalar(name, value, step)

    def event(self, event: Event) -> None:
        step = getattr(event, "step", None) or 0
        fields = event.model_dump(exclude_none=True, exclude={"time", "kind", "stage"})
        text = ", ".join(f"{key}: {value}" for key, value in fields.items())
        self._writing_from(step).add_text(event.kind, text or event.kind, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _writing_from(self, step: int) -> SummaryWriter:
        """The writer, which hides what was written for ``step`` and later before a resume."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step)
        return self._writer
