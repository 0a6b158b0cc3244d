"""A data set as the loader draws from it: rows become examples, examples documents, documents units; all is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

from postlude.data.dataset import Dataset
from postlude.data.document import Document, Unit
from postlude.data.encode import Encoded, Encoder
from postlude.data.example import Conversation, answers_of
from postlude.data.masks import UnprintedError
from postlude.data.statistics import Dropped, SourceStatistics
from postlude.errors import DataError

UNUSABLE = "cannot be rendered or tokenised"
"""Why an example is dropped that the encoder refused, where bad records are skipped."""


class EncodedDataset:
    """The units of a data set (:class:`postlude.data.windows.UnitSource`).

    ``units`` says which of an example's documents belong together. An example that the encoder refuses stops
    everything with a DataError that names it, or is dropped and counted, as the data set's ``on_bad_record`` says.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        units: Callable[[Sequence[Document]], tuple[Unit, ...]],
        on_bad_record: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.dataset, self.encoder = dataset, encoder
        self.groups, self.files, self.seekable = dataset.groups, dataset.files, dataset.seekable
        self._units, self._on_bad_record = units, on_bad_record
        self.statistics = SourceStatistics(dataset.name, dataset.rows, filtered=self._left_out())

    def units(self, group: int, positions: Sequence[int]) -> list[tuple[Unit, ...]]:
        """The units of these rows of a group: one tuple for each position, empty where the record was dropped."""
        rows = self.dataset.examples(group, positions)
        encoded = iter(self.encoder.encode([example for row in rows for example in row], self.dataset.name))
        self.statistics.read += len(rows)
        self.statistics.filtered = self._left_out()
        return [tuple(unit for name, _ in row for unit in self._units_of(name, next(encoded))) for row in rows]

    @cached_property
    def has_conversations(self) -> bool:
        """Whether its first example is one, or an answer in one."""
        for group, rows in enumerate(self.groups):
            for row in range(rows):
                for _, example in self.dataset.examples(group, [row])[0]:
                    return isinstance(answers_of(example)[0], Conversation)
        return False

    def _left_out(self) -> dict[str, Dropped]:
        """What the data set has left out so far: by its filters, and bad records that were met since."""
        return {
            reason: Dropped(dropped.count, [identity for identity, _ in dropped.examples])
            for reason, dropped in self.dataset.dropped.items()
        }

    def _units_of(self, example_id: str, encoded: Encoded) -> tuple[Unit, ...]:
        for kind in sorted(encoded.unprinted):
            self.statistics.unprinted.setdefault(kind, Dropped()).add(example_id)
        if isinstance(encoded.error, UnprintedError):  # the fault is not the record's, so none is left out for it
            told = str(encoded.error).replace("data.NAME", f"data.{self.dataset.name}")
            raise DataError(f"The example '{example_id}' loses something: {told}") from encoded.error
        if encoded.error is not None:
            if self._on_bad_record == "stop":
                raise DataError(
                    f"The example '{example_id}' cannot be used: {str(encoded.error).rstrip('.')}. Mend it, or set "
                    f"data.{self.dataset.name}.on_bad_record to skip to leave such examples out and count them."
                ) from encoded.error
            self.statistics.drop(UNUSABLE, example_id)
            return ()
        if encoded.truncated:
            self.statistics.truncated += 1
            self.statistics.tokens_cut += encoded.truncated
        if encoded.dropped is not None:
            self.statistics.drop(encoded.dropped, example_id)
            return ()
        units = self._units(encoded.documents)
        self.statistics.add(units)
        return units
