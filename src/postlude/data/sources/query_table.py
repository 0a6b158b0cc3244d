"""A table of the source ``query``: raw files under a name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from postlude.manifest.component import Config


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
