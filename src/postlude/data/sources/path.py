"""The source ``path``: files of this machine or behind any URI."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from postlude.data.records import Records
from postlude.data.sources.source import Source


class Path(Source):
    """JSON lines, JSON arrays, Parquet, CSV and TSV; text also compressed with gzip or Zstandard."""

    path: str | Annotated[list[str], Field(min_length=1)]
    """A file, a list of files, a folder (all the data files below it) or a pattern such as ``data/*.jsonl.gz``."""
    stream: bool | None = None
    """Read groups of rows in turn and hold one at a time, or any row at any moment; by default single rows where the
    files are local and together under 2 GiB (a compressed byte counts four times)."""

    @property
    def paths(self) -> list[str]:
        """What is given, as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    def files(self) -> list[str]:
        from postlude.data.sources.files import find_files

        return [uri for path in self.paths for uri in find_files(path)]

    def open(self, cache: str) -> Records:
        from postlude.data.sources.files import open_files

        return open_files(self.paths, self.stream, cache)
