"""The source ``hub``: a data set of the Hugging Face hub, by name."""

from __future__ import annotations

import glob

from postlude.data.records import Records
from postlude.data.sources.source import Source


class Hub(Source):
    """A data set of the hub, or a folder in the hub's form, with random access."""

    hub: str
    """Its name (``openai/gsm8k``) or a local folder."""
    split: str = "train"
    """The split, or a part of one as ``datasets`` has it: ``train[:10%]``."""
    subset: str | None = None
    """The configuration, where the data set has several."""
    revision: str | None = None
    """A branch, tag or commit; a commit makes sure that the data are the same tomorrow."""

    def files(self) -> list[str]:
        from postlude import storage

        if not storage.is_directory(self.hub):
            return []
        below = storage.expand(storage.join(glob.escape(self.hub), "**"))
        return [uri for uri in below if not storage.is_directory(uri)]

    def open(self, cache: str) -> Records:
        from postlude.data.sources.hub_rows import load

        return load(self.hub, self.split, self.subset, self.revision)
