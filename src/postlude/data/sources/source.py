"""What a source is."""

from __future__ import annotations

from postlude.data.records import Records
from postlude.manifest.component import Component


class Source(Component):
    """Where records come from. The component of the kind ``sources``."""

    def files(self) -> list[str]:
        """The URIs of the files that hold the records: their content tells whether the data have changed. Empty where
        the keys alone say what the records are. DataError if one is missing.
        """
        return []

    def open(self, cache: str) -> Records:
        """The records. ``cache`` is the URI of a folder for what is made once and used again.

        DataError if there are none, or they cannot be read.
        """
        raise NotImplementedError
