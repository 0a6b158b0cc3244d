"""What became of the loss of each example while a stage ran: an index of the losses by example, kept up with them.

A stage tells millions of losses, so what is held of an example are a few numbers: its first loss, its least, its last.
All of its losses are read again, from the parts that hold it, when its history is asked for.

A part that is as large as one may be is never merged: it is taken up once. The others, a few of each rank, are taken up
each by itself. Where a part that was taken up for good is gone, or is another, a resume has cut it, and all parts are
read anew. A loss is told by token; where the objective says so it is of another unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from postlude import storage
from postlude.runs import examples
from postlude.runs.arrays import numbers, text_scalar
from postlude.runs.folds import EXAMPLE, NUMBERS, SOURCE_BITS, Fold, Sums

if TYPE_CHECKING:
    import pyarrow

Order = Literal["worst", "forgotten"]

_ATTEMPTS = 5


@dataclass(frozen=True)
class ExampleLosses:
    """What became of one example. Losses are by token."""

    example_id: str
    source: str
    times: int
    """How often it was trained on."""
    first_step: int
    first: float
    best_step: int
    best: float
    last_step: int
    last: float


@dataclass(frozen=True)
class History:
    """All losses of one example, in the order of steps."""

    example_id: str
    source: str
    steps: np.ndarray
    epochs: np.ndarray
    losses: np.ndarray
    """By token."""
    tokens: np.ndarray


@dataclass(frozen=True)
class SourceLosses:
    """The losses of the examples of one source. A point tells of ``width`` steps from its own on."""

    source: str
    examples: int
    rows: int
    not_finite: int
    """Of the rows, whose loss is not finite: they are in no mean."""
    width: int
    steps: np.ndarray
    losses: np.ndarray
    """Means by token."""


class _Names:
    """Numbers of examples by their ids, which are held once."""

    def __init__(self) -> None:
        self._index = np.zeros(0, np.int64), np.zeros(0, np.int32)
        """Their hashes, rising, and the number of each. Of two ids with one hash, which no run will see, the second
        counts as the first."""
        self._ids: list[pyarrow.Array] = []
        self._starts: list[int] = []
        self.count = 0

    def codes(self, ids: pyarrow.ChunkedArray) -> np.ndarray:
        """The number of each, new ones after those that are known."""
        import pyarrow as pa

        encoded, (known, codes) = ids.combine_chunks().dictionary_encode(), self._index
        hashes = np.fromiter(map(hash, encoded.dictionary.to_pylist()), np.int64, len(encoded.dictionary))
        new, first = np.unique(hashes, return_index=True)
        places = np.searchsorted(known, new)
        is_known = places < len(known)
        is_known[is_known] = known[places[is_known]] == new[is_known]
        first = np.sort(first[~is_known])  # in the order of their coming
        if len(first):
            new = hashes[first]
            order = np.argsort(new)
            places = np.searchsorted(known, new[order])
            known, codes = np.insert(known, places, new[order]), np.insert(codes, places, self.count + order)
            self._index = known, codes
            # Not pa.array, which imports pandas wherever it is installed: much memory for a server.
            rows = pa.Array.from_buffers(pa.int64(), len(first), [None, pa.py_buffer(first.astype(np.int64))])
            self._ids.append(encoded.dictionary.take(rows))
            self._starts.append(self.count)
            self.count += len(first)
        return codes[np.searchsorted(known, hashes)][numbers(encoded.indices)].astype(np.int64)

    def code(self, example_id: str) -> int | None:
        known, codes = self._index
        place = int(np.searchsorted(known, hash(example_id)))
        return int(codes[place]) if place < len(known) and known[place] == hash(example_id) else None

    def name(self, code: int) -> str:
        chunk = int(np.searchsorted(self._starts, code, side="right")) - 1
        return str(self._ids[chunk][code - self._starts[chunk]].as_py())

    def containing(self, text: str, count: int) -> list[str]:
        """Some ids in which a text stands."""
        import pyarrow.compute as pc

        found: list[str] = []
        for ids in self._ids:
            found += ids.filter(pc.match_substring(ids, text)).slice(0, count - len(found)).to_pylist()
            if len(found) >= count:
                break
        return found


@dataclass
class _State:
    """What was taken up so far."""

    names: _Names = field(default_factory=_Names)
    sources: dict[str, int] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)
    """Of the parts that were taken up for good."""
    members: dict[str, np.ndarray] = field(default_factory=dict)
    """Of each of these which examples it holds, eight in a byte."""
    settled: Fold | None = None
    open: dict[str, tuple[str, Fold]] = field(default_factory=dict)
    """Of the other parts the stamp, and what they come to."""
    damaged: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of such parts the stamp, and what is wrong."""


class Losses:
    """The losses by example of a stage, behind the URI of its folder ``examples``. :meth:`update` is called by one
    thread; the rest tells what stood when it last returned. Errors of reading are those of storage."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._state = _State()
        self._whole = Fold(np.zeros(0, np.int64), np.zeros(0, EXAMPLE), Sums.total([]))
        self._told = self._state
        self._names: list[str] = []

    def update(self) -> bool:
        """Take up the parts that came, or changed. Whether any did."""
        standing, state = examples.standing(self.uri), self._state
        is_cut = any(standing.get(name) != stamp for name, stamp in state.stamps.items())
        if is_cut:
            state = self._state = _State()
        known = state.stamps | {name: stamp for name, (stamp, _) in (state.open | state.damaged).items()}
        if known == standing and not is_cut:
            return False
        for kept in (state.open, state.damaged):
            for name in [name for name in kept if standing.get(name) != kept[name][0]]:
                del kept[name]
        full: list[Fold] = []
        for name, stamp in standing.items():
            if known.get(name) == stamp:
                continue
            try:
                fold, is_full = self._take_up(name)
            except storage.NotFound:  # merged, or cut away, since it was listed: the next look sees it
                continue
            except storage.CorruptError as error:
                state.damaged[name] = stamp, str(error)
                continue
            if not is_full:
                state.open[name] = stamp, fold
                continue
            state.stamps[name] = stamp
            state.members[name] = np.packbits(np.bincount(fold.codes, minlength=state.names.count).astype(bool))
            full.append(fold)
            if len(full) == 4:  # so that not all of a long run are held at once
                self._settle(full)
        self._settle(full)
        settled = [state.settled] if state.settled else []
        others = [fold for _, fold in state.open.values()]
        whole = settled[0] if settled and not others else Fold.total([*settled, *others], state.names.count)
        self._whole, self._told, self._names = whole, state, list(state.sources)
        return True

    def _take_up(self, name: str) -> tuple[Fold, bool]:
        """What a part comes to, and whether it is as large as one may be."""
        import pyarrow.compute as pc

        table, state = examples.read_part(self.uri, name), self._state
        codes = state.names.codes(table["example_id"])
        named = table["source"].combine_chunks().dictionary_encode()
        known = [state.sources.setdefault(source, len(state.sources)) for source in named.dictionary.to_pylist()]
        places = np.where(numbers(pc.is_valid(named.indices)), numbers(named.indices), 0)
        sources = np.array(known, np.int64)[places] if len(table) else codes
        shift = state.settled.sums.shift if state.settled else 0
        return Fold.of(codes, sources, table, shift), len(table) >= examples.ROWS_OF_A_PART

    def _settle(self, folds: list[Fold]) -> None:
        if folds:
            before = [self._state.settled] if self._state.settled else []
            self._state.settled = Fold.total([*before, *folds], self._state.names.count)
            folds.clear()

    # --- what is told ---------------------------------------------------------------------------------------

    @property
    def damages(self) -> list[str]:
        """What is wrong with parts that cannot be read."""
        return [why for _, why in self._told.damaged.values()]

    @property
    def sources(self) -> list[str]:
        return self._names

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._whole.codes)

    def ranked(self, order: Order, count: int, source: str | None = None, first: int = 0) -> list[ExampleLosses]:
        """So many examples from the place ``first`` on: with the highest last loss, or that have risen most above their
        best. Only such count as forgotten whose best is no higher than that of half of the examples. A last loss that
        is not finite comes first."""
        held = self._whole.examples
        last = np.where(np.isfinite(held["last"]), held["last"], np.inf)
        chosen = np.ones(len(held), bool)
        if source is not None:
            chosen &= held["source"] == self._told.sources.get(source, -1)
        measure = last
        if order == "forgotten":
            best = held["best"]
            low = np.nanmedian(best) if np.isfinite(best).any() else np.inf
            chosen &= (best <= low) & (held["best_step"] < held["last_step"]) & (last > best)
            measure = last - np.where(np.isfinite(best), best, 0)
        places = np.flatnonzero(chosen)
        places = places[np.argsort(-measure[places], kind="stable")][first : first + count]
        return [self._example(int(place)) for place in places]

    def example(self, example_id: str) -> ExampleLosses | None:
        """What became of one; None where it is not known."""
        code = self._told.names.code(example_id)
        place = len(self) if code is None else int(np.searchsorted(self._whole.codes, code))
        if place == len(self) or self._whole.codes[place] != code:
            return None
        return self._example(place)

    def containing(self, text: str, count: int = 20) -> list[str]:
        """Some ids in which a text stands."""
        return self._told.names.containing(text, count)

    def by_source(self) -> list[SourceLosses]:
        """The losses of each source."""
        sums, examples_of = self._whole.sums, np.bincount(self._whole.examples["source"], minlength=len(self._names))
        told = []
        for number, name in enumerate(self._names):
            rows = (sums.keys >> SOURCE_BITS) == number
            loss, tokens, count, not_finite = sums.sums[rows].T
            steps = (sums.keys[rows] & (2**SOURCE_BITS - 1)) << sums.shift
            is_told = tokens > 0
            means = loss[is_told] / tokens[is_told]
            width, spoilt = 2**sums.shift, int(not_finite.sum())
            found = int(examples_of[number])
            told.append(SourceLosses(name, found, int(count.sum()), spoilt, width, steps[is_told], means))
        return told

    def history(self, example_id: str) -> History | None:
        """All losses of one example; None where it is not known. Reads the parts that hold it, some of each."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._history(example_id)
            except storage.NotFound:  # merged, or cut away, since they were taken up
                if attempt + 1 == _ATTEMPTS:
                    raise
                self.update()
        raise AssertionError

    def _history(self, example_id: str) -> History | None:
        import pyarrow as pa

        state, code = self._told, self._told.names.code(example_id)
        if code is None:
            return None
        byte, bit = divmod(code, 8)
        names = [name for name, members in list(state.members.items()) if _holds(members, byte, bit)]
        names += [name for name, (_, fold) in list(state.open.items()) if code in fold.codes]
        if not names:
            return None
        table = pa.concat_tables([self._rows(name, example_id) for name in names]).sort_by("step")
        tokens = numbers(table["tokens"])
        losses = np.divide(numbers(table["loss"]), tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
        sources = table["source"].to_pylist()
        return History(
            example_id,
            sources[0] if sources else "",
            numbers(table["step"]),
            numbers(table["epoch"]),
            losses,
            tokens,
        )

    def _rows(self, name: str, example_id: str) -> pyarrow.Table:
        """The rows of an example in a part that was read whole before, when its digest was looked at."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        place = storage.join(self.uri, name)
        try:
            with storage.open_file(place) as file:
                table = pq.ParquetFile(file).read(use_threads=False).replace_schema_metadata(None)
            return table.filter(pc.equal(table["example_id"], text_scalar(example_id)))
        except (pa.ArrowException, ValueError) as error:
            raise storage.damaged(place, f"it cannot be read ({error})", "") from error

    def _example(self, place: int) -> ExampleLosses:
        held, name = self._whole.examples[place], self._told.names.name(int(self._whole.codes[place]))
        numbers: Mapping[str, Any] = {key: held[key].item() for key in NUMBERS}
        return ExampleLosses(name, self._names[held["source"]], **numbers)


def _holds(members: np.ndarray, byte: int, bit: int) -> bool:
    return byte < len(members) and bool(members[byte] >> (7 - bit) & 1)
