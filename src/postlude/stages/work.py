"""Stages that do something else than train: they generate, filter, evaluate, merge.

Their work is cut into portions, which are a pure function of manifest and data. Ranks share the portions, each is
committed when it is done, and a resume does those that are missing; so the artifact is the same however often the
stage was stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from postlude.manifest.schema import NamesDatasets, StageConfig
from postlude.manifest.types import Name, Positive

if TYPE_CHECKING:
    from rich.console import RenderableType

    from postlude.data.document import Document
    from postlude.stages.workbench import Workbench

Datasets = Annotated[dict[str, Annotated[float, Field(ge=1, le=1)]], Field(min_length=1), NamesDatasets()]
"""Data sets by name, each with the weight 1: all of its records are used, once."""

Entry = Mapping[str, Any]
"""Something that a portion of the work gives; JSON can hold it."""


class WorkRecipe(StageConfig):
    """Base of the kind ``recipes`` for stages that do something else than train."""

    free: ClassVar[tuple[str, ...]] = ()

    pool: Name = "train"
    """The pool of ``compute.pools`` whose workers do it."""
    threads: Positive | None = None
    """CPU threads of each worker; by default the machine's cores, shared out."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What models compute in: ``auto`` is fp32 on a CPU, and on CUDA the dtype that the checkpoint is stored in."""

    def begin(self, bench: Workbench) -> Work:
        """The work of this stage on one rank, nothing of it done. UserError for what cannot be worked on."""
        raise NotImplementedError

    def rehearsed(self) -> Self:
        """The same with so little of everything that a preflight can do all of it."""
        return self


class Work(ABC):
    """The work of a stage on one rank. The same on every rank, whatever their number."""

    portions: int = 0
    """How many portions there are; with none, all of the work is done in :meth:`finish`."""
    reads: Mapping[str, str] = {}
    """Fingerprints of the data sets that it reads, by name: a resume with others is refused."""

    def do(self, portion: int) -> list[Entry]:
        """Do one portion."""
        raise NotImplementedError

    def measure(self, entries: Sequence[Entry]) -> Mapping[str, float]:
        """A portion's line of metrics. ``tokens`` are those that were computed."""
        return {"tokens": 0}

    @abstractmethod
    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        """Write the artifact into a local folder, from what the portions gave, in order. On the leading rank.

        Returns the report on it, which is written beside it as ``report.json``. DataError if nothing came out.
        """

    def parents(self) -> Mapping[str, Any]:
        """For the lineage: the models that the work is done with, by what they are in it."""
        return {}

    def events(self, report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What to tell of the report: kinds of events with their fields."""
        yield from ()

    def table(self, report: Mapping[str, Any]) -> RenderableType:
        """The report for a person."""
        from rich.pretty import Pretty

        return Pretty(report)

    def prompts(self) -> Iterator[Document]:
        """What is put to a model, for a preview; nothing where nothing is."""
        yield from ()

    def counts(self) -> Mapping[str, Any]:
        """What a preflight tells of the data, read whole."""
        return {}
