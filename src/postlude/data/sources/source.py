"""What a source is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postlude.manifest.component import Component

if TYPE_CHECKING:
    from postlude.data.records import Records


class Source(Component):
    """Where records come from. The component of the kind ``sources``."""

    def open(self, cache: str) -> Records:
        """The records. ``cache`` is the URI of a folder for what is made once and used again.

        DataError if there are none, or they cannot be read.
        """
        raise NotImplementedError
