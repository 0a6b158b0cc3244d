"""Running a query over raw files with DuckDB, once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import pyarrow as pa

from postlude import storage
from postlude.data.records import digest
from postlude.data.sources.cache import make_once
from postlude.data.sources.files import file_fingerprint, local_copy, match_files
from postlude.data.sources.query_table import Table
from postlude.data.sources.tables import ArrowRows, write_arrow
from postlude.errors import DataError

_RESULT = "__postlude_result"
_JSON_ENDINGS = tuple(f".{kind}{packed}" for kind in ("json", "jsonl", "ndjson") for packed in ("", ".gz", ".zst"))
_WHOLE = "sample_size = -1, map_inference_threshold = -1"
"""Types of JSON are told by all of it, and an object is never a map."""
_TYPED_TEXT = re.compile(r'"(?:[^"]|"")*"|\b(?:UUID|DATE|TIMESTAMP(?:_NS| WITH TIME ZONE)?|TIME)\b(?=[\[\],)]|$)')
"""Types that DuckDB gives texts of JSON, which has none of them. Quoted names are passed over."""


def query_rows(query: str, tables: Mapping[str, Table], cache: str) -> ArrowRows:
    """The rows of the query. DataError if it cannot be run or gives none."""
    identity = [query, *map(file_fingerprint, _files_named_in(query))]
    uris = {name: _files_of(table) for name, table in tables.items()}
    for name, table in sorted(tables.items()):
        identity += [name, table.model_dump_json(exclude={"path"}), *map(file_fingerprint, uris[name])]
    fingerprint = digest(*identity)

    def run(path: str) -> None:
        with _connect() as connection:
            connection.execute(f"SET temp_directory = {_text(f'{path}.temporary')}")
            for name, table in tables.items():
                _create_view(connection, name, table, [_on_this_machine(uri, cache) for uri in uris[name]])
            _create_views_of_files(connection, query)
            _write_result(connection, query, path)

    rows = ArrowRows(make_once(cache, f"query-{fingerprint}.arrow", run), "the query's result", fingerprint)
    if not rows.rows:
        raise DataError(
            f"The query gives no row: {query.strip().splitlines()[0]} ... Loosen its conditions, or check its files."
        )
    return rows


def files_read(query: str, tables: Mapping[str, Table]) -> list[str]:
    """The files that the query reads: those that it names itself, then those of the tables. DataError as above."""
    return [*_files_named_in(query), *(uri for _, table in sorted(tables.items()) for uri in _files_of(table))]


def _connect() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"autoinstall_known_extensions": False})


def _write_result(connection: duckdb.DuckDBPyConnection, query: str, path: str) -> None:
    try:
        connection.execute(f'CREATE VIEW "{_RESULT}" AS {query}')
        result = connection.sql(f'FROM "{_RESULT}" ORDER BY ALL')
        reader = pa.RecordBatchReader.from_stream(result)
        schema = pa.schema(
            [f.with_type(_arrow_type(kind, f.type)) for f, kind in zip(reader.schema, result.types, strict=True)]
        )
        write_arrow(path, schema, reader)
    except (duckdb.Error, pa.ArrowException) as error:
        raise DataError(f"The query cannot be run. {error}") from error


def _arrow_type(kind: Any, plain: pa.DataType) -> pa.DataType:
    """The type that Arrow gives a DuckDB type, with Arrow's own type for JSON where DuckDB's is JSON."""
    if str(kind) == "JSON":
        return pa.json_()
    if kind.id == "list":
        return pa.list_(plain.value_field.with_type(_arrow_type(kind.child, plain.value_type)))
    if kind.id == "struct":
        return pa.struct(
            [f.with_type(_arrow_type(child, f.type)) for f, (_, child) in zip(plain, kind.children, strict=True)]
        )
    if kind.id == "map":
        item = plain.item_field.with_type(_arrow_type(kind.children[1][1], plain.item_type))
        return pa.map_(plain.key_type, item)
    return plain


def _create_views_of_files(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Give the files of JSON that the query names itself views of their names, so that they are read as tables are."""
    for name in _names_in(query):
        paths = [storage.local_path(uri) for uri in storage.expand(name) if os.path.isfile(storage.local_path(uri))]
        if paths and _format_of(name) == "json" and name.lower().endswith(_JSON_ENDINGS):
            _create_view(connection, name, Table(path=name, format="json"), paths)


def _columns_of_json(connection: duckdb.DuckDBPyConnection, paths: str) -> str:
    """The columns of files of JSON with their types, in which what is a text there stays one."""
    described = connection.execute(f"DESCRIBE SELECT * FROM read_json({paths}, {_WHOLE})").fetchall()
    types = ", ".join(f"{_text(name)}: {_text(_as_texts(kind))}" for name, kind, *_ in described)
    return f"columns = {{{types}}}"


def _as_texts(kind: str) -> str:
    return _TYPED_TEXT.sub(lambda found: found[0] if found[0].startswith('"') else "VARCHAR", kind)


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, table: Table, paths: list[str]) -> None:
    reader = table.format or _format_of(paths[0])
    arguments = [f"[{', '.join(map(_text, paths))}]"]
    if reader != "parquet" and table.columns is not None:
        types = ", ".join(f"{_text(column)}: {_text(kind)}" for column, kind in table.columns.items())
        arguments.append(f"columns = {{{types}}}")
    elif reader == "json":
        try:
            arguments.append(_columns_of_json(connection, arguments[0]))
        except duckdb.Error as error:
            raise DataError(f"The table '{name}' of the query cannot be read from '{paths[0]}'. {error}") from error
    if reader == "csv":
        header = table.header if table.header is not None or table.columns is None else False
        options = {"delim": table.delimiter, "quote": table.quote}
        arguments += [f"{key} = {_text(value)}" for key, value in options.items() if value is not None]
        arguments += [] if header is None else [f"header = {str(header).lower()}"]
    known_keys = {"csv": {"columns", "delimiter", "header", "quote"}, "json": {"columns"}, "parquet": set[str]()}
    unused = sorted(table.model_fields_set - {"path", "format"} - known_keys[reader])
    if unused:
        raise DataError(
            f"The table '{name}' of the query is read as {reader}, which has no use for the "
            f"{'key' if len(unused) == 1 else 'keys'} {', '.join(unused)}. Remove it, or set 'format'."
        )
    view = '"' + name.replace('"', '""') + '"'
    try:
        connection.execute(f"CREATE VIEW {view} AS SELECT * FROM read_{reader}({', '.join(arguments)})")
    except duckdb.Error as error:
        raise DataError(f"The table '{name}' of the query cannot be read from '{paths[0]}'. {error}") from error


def _files_of(table: Table) -> list[str]:
    return [uri for path in ([table.path] if isinstance(table.path, str) else table.path) for uri in match_files(path)]


def _on_this_machine(uri: str, cache: str) -> str:
    return storage.local_path(uri) if storage.is_local(uri) else local_copy(uri, file_fingerprint(uri), cache)


def _format_of(path: str) -> str:
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    if stem.endswith(".parquet"):
        return "parquet"
    return "json" if stem.endswith((".json", ".jsonl", ".ndjson")) else "csv"


def _files_named_in(query: str) -> list[str]:
    """The files that the query itself names. DataError if it is no single SELECT, or names a remote file."""
    names = _names_in(query)
    return [uri for name in names for uri in storage.expand(name) if os.path.isfile(storage.local_path(uri))]


def _names_in(query: str) -> list[str]:
    with _connect() as connection:
        parsed = json.loads(connection.execute("SELECT json_serialize_sql($1)", [query]).fetchall()[0][0])
    if parsed["error"]:
        place = parsed.get("position")
        line = f" (line {query.count(chr(10), 0, int(place)) + 1})" if place else ""
        raise DataError(f"The query cannot be read: {parsed['error_message']}{line}.")
    if len(parsed["statements"]) != 1:
        raise DataError(f"The query must be one SELECT; it holds {len(parsed['statements'])} statements.")
    names = sorted(set(_tables_in(parsed)))
    remote = next((name for name in names if "://" in name and not storage.is_local(name)), None)
    if remote is not None:
        raise DataError(f"The query names the remote file '{remote}'. Give it a name under 'tables' and use that.")
    return names


def _tables_in(node: Any) -> Iterator[str]:
    """What stands where a table is named, in the syntax tree of a query: table names, and the arguments of
    functions that give a table."""
    if isinstance(node, list):
        for item in node:
            yield from _tables_in(item)
    elif isinstance(node, dict):
        if node.get("type") == "BASE_TABLE":
            yield node["table_name"]
        elif node.get("type") == "TABLE_FUNCTION":
            yield from _texts_in(node)
        for item in node.values():
            yield from _tables_in(item)


def _texts_in(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _texts_in(item)


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
