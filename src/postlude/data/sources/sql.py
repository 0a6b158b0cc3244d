"""Running a query over raw files with DuckDB, once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from postlude import storage
from postlude.data.records import digest
from postlude.data.sources.cache import find_made, make_once
from postlude.data.sources.files import file_fingerprint, local_copy, match_files
from postlude.data.sources.query_table import Table
from postlude.data.sources.tables import ArrowRows, write_arrow
from postlude.errors import DataError

_RESULT = "__postlude_result"
_TEXT_ENDINGS = tuple(
    f".{kind}{packed}" for kind in ("json", "jsonl", "ndjson", "csv", "tsv") for packed in ("", ".gz", ".zst")
)
_WHOLE = "sample_size = -1, map_inference_threshold = -1"
"""Types of JSON are told by all of it, and an object is never a map."""
_NUMBERS = ("bigint", "ubigint", "hugeint", "uhugeint", "double")
_WHOLE_NUMBER, _LARGE, _LARGER = "-?[0-9]+", "-?[0-9]{16,}", "-?[0-9]{39,}"
_FRACTION = "-?[0-9]+[.eE][-+.eE0-9]*"
"""Numbers of JSON, as regular expressions: large ones may be changed by floating point, larger ones by 128 bits."""
_FORM = 2
"""Of the results: raised when the same query over the same files gives other rows."""


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
                kind = table.format or _format_of(uris[name][0])  # a copy on this machine has no ending
                _create_view(connection, name, table, kind, [_on_this_machine(uri, cache) for uri in uris[name]])
            _create_views_of_files(connection, query)
            _write_result(connection, query, path)

    made = (
        None if _reads_json(query, uris.values(), tables.values()) else find_made(cache, f"query-{fingerprint}.arrow")
    )
    if made is None:
        made = make_once(cache, f"query-{_FORM}-{fingerprint}.arrow", run)
    rows = ArrowRows(made, "the query's result", fingerprint)
    if not rows.rows:
        raise DataError(
            f"The query gives no row: {query.strip().splitlines()[0]} ... Loosen its conditions, or check its files."
        )
    return rows


def _reads_json(query: str, uris: Iterable[Sequence[str]], tables: Iterable[Table]) -> bool:
    """Whether JSON may be in the result, which the version before wrote down as texts. What else it made in this run
    stays as it was."""
    named = [table.format or _format_of(files[0]) for files, table in zip(uris, tables, strict=True)]
    return "json" in named or "json" in query.lower() or any(_format_of(name) == "json" for name in _names_in(query))


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
    """Give the text files that the query names itself views of their names, so that they are read as tables are."""
    for name in _names_in(query):
        paths = [storage.local_path(uri) for uri in storage.expand(name) if os.path.isfile(storage.local_path(uri))]
        if paths and name.lower().endswith(_TEXT_ENDINGS):
            _create_view(connection, name, Table(path=name), _format_of(name), paths)


# --- the types of columns -----------------------------------------------------------------------------------


def _types_of_json(connection: duckdb.DuckDBPyConnection, paths: str) -> dict[str, str]:
    """The columns of files of JSON with their types, in which a text stays one. Whole numbers stay such, up to 128
    bits; in lists where others beside them are fractions they are JSON. DataError where floating point would change
    some."""
    table = connection.sql(f"SELECT * FROM read_json({paths}, {_WHOLE})")
    kinds = dict(zip(table.columns, table.types, strict=True))
    places = sorted({place for name, kind in kinds.items() for place in _floating(kind, f".{_key(name)}")})
    tests = [
        f"bool_or(len(list_filter({_values_in(place)}, lambda x: regexp_full_match(x::VARCHAR, {_text(digits)}))) > 0)"
        for place in places
        for digits in (_WHOLE_NUMBER, _LARGE, _LARGER, _FRACTION)
    ]
    found = connection.execute(f"SELECT {', '.join(tests)} FROM read_json_objects({paths})").fetchall() if tests else []
    types = {place: _type_of_numbers(place, *found[0][4 * n : 4 * n + 4]) for n, place in enumerate(places)}
    return {name: _type_of_json(kind, f".{_key(name)}", types) for name, kind in kinds.items()}


def _values_in(place: str) -> str:
    """The values in a place of a record, a list in SQL."""
    values = f"json_extract(json, {_text(f'${place}')})"
    return values if "[*]" in place else f"[{values}]"


def _type_of_numbers(place: str, is_whole: bool, is_large: bool, is_larger: bool, is_fraction: bool) -> str:
    """The type of a place in which some number is whole, large, larger, a fraction."""
    if is_whole and not is_fraction and not is_larger:
        return "HUGEINT"
    if is_whole and "[*]" in place:
        return "JSON"
    if is_large:
        raise DataError(
            f"The numbers in {place[1:]} would not be read exactly: there are fractions, or numbers of more than 38 "
            "digits, beside whole numbers that floating point does not tell apart. Say under 'tables' with 'columns' "
            "what the columns are, such as VARCHAR."
        )
    return "DOUBLE"


def _floating(kind: Any, place: str) -> Iterator[str]:
    """Where in a type floating point stands, as paths in JSON below the record."""
    if kind.id == "double":
        yield place
    elif kind.id == "list":
        yield from _floating(kind.child, f"{place}[*]")
    elif kind.id == "struct":
        for name, child in kind.children:
            yield from _floating(child, f"{place}.{_key(name)}")


def _type_of_json(kind: Any, place: str, numbers: Mapping[str, str]) -> str:
    if kind.id == "list":
        return f"{_type_of_json(kind.child, f'{place}[*]', numbers)}[]"
    if kind.id == "struct":
        fields = (f"{_quoted(n)} {_type_of_json(child, f'{place}.{_key(n)}', numbers)}" for n, child in kind.children)
        return f"STRUCT({', '.join(fields)})"
    if place in numbers:
        return numbers[place]
    return str(kind) if kind.id in (*_NUMBERS, "boolean") or str(kind) == "JSON" else "VARCHAR"


def _types_of_csv(connection: duckdb.DuckDBPyConnection, arguments: Sequence[str]) -> dict[str, str]:
    """The columns of files of CSV with their types: numbers, true and false where every text is just what that prints
    (and 4 among 3.5 a fraction); all else is text, so also dates, identifiers and 007."""
    table = connection.sql(f"SELECT * FROM read_csv({', '.join(arguments)})")
    kinds = {n: str(k) for n, k in zip(table.columns, table.types, strict=True) if k.id in (*_NUMBERS, "boolean")}
    types = dict.fromkeys(table.columns, "VARCHAR")
    if kinds:
        tests = ", ".join(f"bool_and({_is_just(_quoted(name), kind)})" for name, kind in kinds.items())
        texts = f"types = {_mapping(types)}"
        found = connection.execute(f"SELECT {tests} FROM read_csv({', '.join([*arguments, texts])})").fetchall()[0]
        types |= {name: kind for (name, kind), is_just in zip(kinds.items(), found, strict=True) if is_just}
    return types


def _is_just(column: str, kind: str) -> str:
    same = f"TRY_CAST({column} AS {kind})::VARCHAR IS NOT DISTINCT FROM {column}"
    return f"({same} OR regexp_full_match({column}, '-?(0|[1-9][0-9]{{0,14}})'))" if kind == "DOUBLE" else same


# --- tables -------------------------------------------------------------------------------------------------


def _create_view(
    connection: duckdb.DuckDBPyConnection, name: str, table: Table, reader: str, paths: Sequence[str]
) -> None:
    arguments = [f"[{', '.join(map(_text, paths))}]"]
    if reader != "parquet" and table.columns is not None:
        arguments.append(f"columns = {_mapping(table.columns)}")
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
    try:
        if table.columns is None and reader == "json":
            arguments.append(f"columns = {_mapping(_types_of_json(connection, arguments[0]))}")
        elif table.columns is None and reader == "csv":
            arguments.append(f"types = {_mapping(_types_of_csv(connection, arguments))}")
        connection.execute(f"CREATE VIEW {_quoted(name)} AS SELECT * FROM read_{reader}({', '.join(arguments)})")
    except duckdb.Error as error:
        raise DataError(f"The table '{name}' of the query cannot be read from '{paths[0]}'. {error}") from error


def _files_of(table: Table) -> list[str]:
    return [uri for path in ([table.path] if isinstance(table.path, str) else table.path) for uri in match_files(path)]


def _on_this_machine(uri: str, cache: str) -> str:
    return storage.local_path(uri) if storage.has_path(uri) else local_copy(uri, file_fingerprint(uri), cache)


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


def _mapping(types: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{_text(name)}: {_text(kind)}" for name, kind in types.items()) + "}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _key(name: str) -> str:
    """A key in a path of JSON."""
    return json.dumps(name, ensure_ascii=False)


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
