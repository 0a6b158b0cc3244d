"""A kind of stage of a user's own, all of it: the recipe with its keys, and the class that works on it.

It counts how often words stand in the records of data sets, portion by portion, and keeps the records where one does.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from postlude import storage
from postlude.data.sources.stage import RECORDS
from postlude.errors import DataError
from postlude.recipes.recipe import Datasets, WorkRecipe

if TYPE_CHECKING:
    from postlude.stages.parts import Parts
    from postlude.stages.work import Work

ROWS = 16
"""Records in a portion."""


class Tally(WorkRecipe):
    """How often words stand in the records of data sets."""

    does: ClassVar[str] = "postlude_example.tally:open_tally"

    recipe: Literal["tally"]
    data: Datasets
    """What is counted in."""
    words: Annotated[list[str], Field(min_length=1)]
    """What is counted."""


def open_tally(parts: Parts) -> Work:
    """The stage. What is imported here loads torch, which checking a manifest does without."""
    from postlude.stages.work import Work, read_rows

    class TallyWork(Work):
        """Counts words, :data:`ROWS` records at a time."""

        def __init__(self, parts):
            super().__init__(parts)
            self.config = parts.config_of(Tally)
            self.datasets = {name: parts.dataset(name, (object,)) for name in self.config.data}
            self.reads = {name: dataset.fingerprint for name, dataset in self.datasets.items()}
            self._rows = self.rows(self.datasets)
            self.portions = -(-len(self._rows) // ROWS)

        def do(self, portion, tell):
            entries = []
            for _, record, _ in read_rows(self.datasets, self._rows[portion * ROWS : (portion + 1) * ROWS]):
                text = json.dumps(dict(record), default=str)
                counts = {word: text.count(word) for word in self.config.words}
                entries.append({"record": dict(record), "counts": counts})
            return entries

        def finish(self, portions, folder):
            totals: Counter[str] = Counter()
            kept = 0
            with storage.open_file(storage.join(folder, RECORDS), "wb") as file:
                for entry in (entry for entries in portions for entry in entries):
                    totals.update(entry["counts"])
                    if any(entry["counts"].values()):
                        kept += 1
                        file.write(json.dumps(entry["record"]).encode() + b"\n")
            if not kept:
                raise DataError(f"The stage '{self.parts.task.stage}' found none of {', '.join(self.config.words)}.")
            return {"records": kept, "words": dict(totals)}

        def counts(self):
            return {"records": len(self._rows)}

    return TallyWork(parts)
