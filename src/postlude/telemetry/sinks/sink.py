"""Sinks: where metrics and events go besides the run directory. The component of the kind ``sinks``.

Another tracker is a class of some twenty lines in a package of one's own, registered like any component.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude.manifest.component import Component
from postlude.telemetry.events import Event


class OpenSink:
    """A sink at work for one stage, on the leading rank. What a sink has no use for, it leaves as it is here."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """The metrics of one optimiser step, as in ``metrics.jsonl``. A resume may repeat steps."""

    def event(self, event: Event) -> None:
        """Something that happened."""

    def close(self) -> None:
        """The stage ended or stops for now."""


class Sink(Component):
    """Its fields are keys of the manifest."""

    def open(self, run_uri: str, stage: str) -> OpenSink:
        """Begin to take what a stage tells. UserError if that cannot work: the run then does not start.

        Any later exception switches the sink off; the run goes on.
        """
        raise NotImplementedError
