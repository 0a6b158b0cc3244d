"""The source ``query``: the result of a DuckDB query over raw files, one record a row.

Raw logs become training data in the manifest: filtered for what matters, joined with a catalogue, grouped into one
history a user.

- The result is made once, out of core where it does not fit into memory, and kept in the cache under a name made
  of the query and the identity of every file that it reads.
- Rows stand in the order of all their columns (``ORDER BY ALL``), whatever order the query gives them: that order
  is the same on every machine. A list that the query aggregates has the order that it asks for itself:
  ``list(title ORDER BY time)``, or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from postlude.data.sources.source import Source
from postlude.manifest.component import Config

if TYPE_CHECKING:
    from postlude.data.records import Records


class Table(Config):
    """A raw file, or several of one form, under a name of its own. The keys but ``path`` help where DuckDB cannot
    tell by itself what is in them."""

    path: str | Annotated[list[str], Field(min_length=1)]
    """A file, a list of files or a pattern."""
    format: Literal["csv", "json", "parquet"] | None = None
    """By default what the name says; a name that says nothing is read as ``csv``."""
    columns: dict[str, str] | None = None
    """Names of the columns with their types in SQL, in the order of the file (csv) or by key (json)."""
    delimiter: str | None = None
    """Between the values of csv; may be several characters, such as ``::``."""
    header: bool | None = None
    """Whether the first line of csv holds the names of the columns; with ``columns`` it does not, by default."""
    quote: str | None = None
    """The character round values of csv that hold a delimiter; empty for none."""


class Query(Source):
    """Rows of a SQL query."""

    query: str
    """One SELECT, in DuckDB's SQL. Local files may be named in it directly: ``FROM 'logs/*.parquet'``."""
    tables: dict[str, str | Table] = {}
    """Names for files, to be used in the query: a path, or a mapping with its form. Remote files belong here."""

    def files(self) -> list[str]:
        from postlude.data.sources.sql import files_read

        return files_read(self.query, self._tables)

    def open(self, cache: str) -> Records:
        from postlude.data.sources.sql import query_rows

        return query_rows(self.query, self._tables, cache)

    @property
    def _tables(self) -> dict[str, Table]:
        return {name: Table(path=table) if isinstance(table, str) else table for name, table in self.tables.items()}
