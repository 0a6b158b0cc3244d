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

from postlude.data.records import Records
from postlude.data.sources.query_table import Table
from postlude.data.sources.source import Source


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
