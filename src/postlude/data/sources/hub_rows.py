"""Data sets that the package ``datasets`` loads, as records.

They lie in that package's own cache, memory-mapped. Rows are taken from the Arrow table itself, so that columns of
images or sound are not decoded where a text is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from postlude.data.example import Record
from postlude.data.records import Records, Unreadable, digest
from postlude.data.sources.tables import rows_of
from postlude.errors import DataError


class HubRows(Records):
    """A split, as one group."""

    def __init__(self, table: datasets.Dataset, name: str) -> None:
        self._table, self._name = table.with_format("arrow"), name
        # The folder of each cached file is named after the commit, or a hash of the files it was made from.
        made_from = [os.path.basename(os.path.dirname(file["filename"])) for file in table.cache_files]
        super().__init__([len(table)], digest(name, str(len(table)), *made_from))

    def read(self, group: int, rows: Sequence[int] | None = None) -> list[Record | Unreadable]:
        wanted = range(self.groups[0]) if rows is None else [int(row) for row in rows]
        return rows_of(self._table[wanted]) if len(wanted) else []

    def where(self, group: int, row: int) -> str:
        return f"{self._name}, row {row + 1}"


def load(hub: str, split: str, subset: str | None, revision: str | None) -> HubRows:
    """The records of a split. DataError if it cannot be loaded or is empty."""
    what = f"'{hub}'" + (f", subset '{subset}'" if subset else "")
    try:
        table = datasets.load_dataset(hub, subset, split=split, revision=revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"The hub has no data set {what}, or you may not read it: {error}. Check the name; a private or gated "
            "data set needs the environment variable HF_TOKEN."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"The data set {what} is not on this machine and the hub cannot be reached: {error}. Check the name and "
            "the connection (HF_HUB_OFFLINE forbids one), or give a local folder."
        ) from error
    except DatasetGenerationError as error:
        raise DataError(f"The files of the data set {what} cannot be read: {error.__cause__ or error}") from error
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"The split '{split}' of the data set {what} cannot be loaded: {error}") from error
    if not len(table):
        raise DataError(f"The split '{split}' of the data set {what} holds no record. Choose another.")
    return HubRows(table, f"{hub} ({split})")
