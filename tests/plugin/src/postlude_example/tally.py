"""A kind of stage of a user's own, all of it: the recipe with its keys, and the class that works on it.

It counts how often words stand in the records of data sets, portion by portion, and keeps the records where one does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from postlude import storage
from postlude.data.sources.stage import RECORDS
from postlude.errors import DataError
from postlude.recipes.recipe import Datasets, WorkRecipe
from postlude.stages.parts import Parts
from postlude.stages.work import Entry, Tell, Work, read_rows

ROWS = 16
"""Records in a portion."""


class Tally(WorkRecipe):
    """How often words stand in the records of data sets."""

    does: ClassVar[str] = "postlude_example.tally:TallyWork"

    recipe: Literal["tally"]
    data: Datasets
    """What is counted in."""
    words: Annotated[list[str], Field(min_length=1)]
    """What is counted."""


class TallyWork(Work):
    """Counts words, :data:`ROWS` records at a time."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.config = parts.config_of(Tally)
        self.datasets = {name: parts.dataset(name, (object,)) for name in self.config.data}
        self.reads = {name: dataset.fingerprint for name, dataset in self.datasets.items()}
        self._rows = self.rows(self.datasets)
        self.portions = -(-len(self._rows) // ROWS)

    def do(self, portion: int, tell: Tell) -> list[Entry]:
        rows = self._rows[portion * ROWS : (portion + 1) * ROWS]
        entries = []
        for _, record, _ in read_rows(self.datasets, rows):
            text = json.dumps(dict(record), default=str)
            entries.append({"record": dict(record), "counts": {word: text.count(word) for word in self.config.words}})
        return entries

    def finish(self, portions: Iterable[Sequence[Entry]], folder: str) -> Mapping[str, Any]:
        counts: Counter[str] = Counter()
        kept = 0
        with storage.open_file(storage.join(folder, RECORDS), "wb") as file:
            for entry in (entry for entries in portions for entry in entries):
                counts.update(entry["counts"])
                if any(entry["counts"].values()):
                    kept += 1
                    file.write(json.dumps(entry["record"]).encode() + b"\n")
        if not kept:
            raise DataError(f"The stage '{self.parts.task.stage}' found none of {', '.join(self.config.words)}.")
        return {"records": kept, "words": dict(counts)}

    def counts(self) -> Mapping[str, Any]:
        return {"records": len(self._rows)}
