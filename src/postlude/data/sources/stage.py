"""The source ``from``: records that a stage of the same manifest made."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from postlude import storage
from postlude.data.records import Records
from postlude.data.sources.path import Path
from postlude.data.sources.source import Source

RECORDS = "data.jsonl"
"""The file in the artifact of a stage that makes records."""


class FromStage(Source):
    """The records that a stage makes: responses that it generated, examples that it kept."""

    from_: Annotated[str, Field(alias="from")]
    """The stage's name."""

    def at(self, artifact: str) -> Path:
        """The same records as a file, once it is known where the stage's artifact stands."""
        return Path(path=storage.join(artifact, RECORDS))

    def open(self, cache: str) -> Records:
        raise AssertionError("a source in a stage is opened where the stage's artifact is known")
