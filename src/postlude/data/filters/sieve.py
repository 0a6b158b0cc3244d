"""The filters of a data set as one: from a batch of records to a verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from postlude.data.example import BadRecord, Format, Record
from postlude.data.filters.filter import Content, Filter, content_of

if TYPE_CHECKING:
    from postlude.data.filters.predicate import Predicates

Verdict = str | BadRecord | None
"""Why a record is dropped, or what is wrong with it; None keeps it."""


class Sieve:
    """Predicates (texts) and registered filters, applied in order; what one drops, no later one sees.

    ``batches`` gives all the records once, before the pass; only predicates ask for it.
    """

    def __init__(
        self, filters: Sequence[str | Filter], format: Format, batches: Callable[[], Iterable[Sequence[Record]]]
    ) -> None:
        self._reading = _Reading(format)
        self._predicates: Predicates | None = None
        predicates = [entry for entry in filters if isinstance(entry, str)]
        if predicates:
            from postlude.data.filters.predicate import Predicates

            self._predicates = Predicates(predicates, _Again(batches))
        self._judges: list[str | tuple[str, Callable[[Record], str | None]]] = [
            entry if isinstance(entry, str) else (entry.component_name, entry.start(self._reading)) for entry in filters
        ]

    def __call__(self, records: Sequence[Record], where: Callable[[int], str]) -> list[Verdict]:
        """A verdict for each record. ``where`` tells where the record at a place stands, for errors."""
        self._reading.forget()
        verdicts: list[Verdict] = [None] * len(records)
        for judge in self._judges:
            left = [place for place, verdict in enumerate(verdicts) if verdict is None]
            if isinstance(judge, str):
                assert self._predicates is not None
                for place in left:
                    if (wrong := self._predicates.odd(records[place], partial(where, place))) is not None:
                        verdicts[place] = BadRecord(wrong)
                left = [place for place in left if verdicts[place] is None]
                keeps = self._predicates.keeps(judge, [records[place] for place in left], places_in(where, left))
                for place, keep in zip(left, keeps, strict=True):
                    verdicts[place] = None if keep else judge
                continue
            name, reason_to_drop = judge
            for place in left:
                try:
                    reason = reason_to_drop(records[place])
                except BadRecord as error:
                    verdicts[place] = error
                else:
                    verdicts[place] = f"{name}: {reason}" if reason is not None and name else reason
        return verdicts


def places_in(where: Callable[[int], str], places: Sequence[int]) -> Callable[[int], str]:
    """Tells where the record at a place stands among some of the records, those at ``places``."""
    return lambda place: where(places[place])


class _Again:
    """The batches of records, from the first at each iteration."""

    def __init__(self, batches: Callable[[], Iterable[Sequence[Record]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Sequence[Record]]:
        return iter(self._batches())


class _Reading:
    """What the format makes of records, once for all the filters that ask."""

    def __init__(self, format: Format) -> None:
        self._format = format
        self._known: dict[int, Content] = {}

    def __call__(self, record: Record) -> Content:
        if id(record) not in self._known:
            self._known[id(record)] = content_of(self._format.parse(record))
        return self._known[id(record)]

    def forget(self) -> None:
        """Forget the records so far, before their places in memory are used again."""
        self._known.clear()
