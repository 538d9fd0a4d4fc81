"""Questions to a run, in SQL or as filters, over tables in memory.

The tables come from verified shards; SQL sees them as views and cannot reach anything else: no
file, no network, no extension, no setting. DuckDB is the engine and its SQL is the language.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa
from pyarrow.dataset import Dataset

from pipeline.errors import QueryError, did_you_mean

VIEWS = {
    "measurements": "one line per measured number",
    "units": "one line per unit of work, with its machine, times and versions",
    "summary": "one line per checkpoint and quantity",
    "layers": "one line per checkpoint, quantity and layer",
    "bounds": "one line per checkpoint and inequality, with both sides",
    "correlations": "one line per pair of quantities",
    "matrix": "one line per pair of the pair plot",
    "failures": "the units that failed and were not repeated since",
}
_TRUNCATED = b"flatcensus.truncated"
_BATCH_ROWS = 10_000  # chosen
_ALLOWED = "one SELECT, WITH, FROM, DESCRIBE, SHOW or SUMMARIZE statement"


# What a terminal shows of a view unless columns are asked for; the rest is there by SQL.
MAIN_COLUMNS: dict[str, tuple[str, ...]] = {
    "summary": (
        "checkpoint", "series", "value", "stderr", "ci_low", "ci_high", "error_bound",
        "num_samples", "num_missing", "status",
    ),
    "layers": (
        "checkpoint", "series", "layer", "value", "stderr", "ci_low", "ci_high", "num_samples",
        "status",
    ),
    "bounds": (
        "checkpoint", "label", "bound", "kind", "layer", "left", "right", "slack_log10", "holds",
        "is_theorem", "conditions_met", "conditions",
    ),
    "units": (
        "checkpoint", "metric", "label", "start", "stop", "draw_start", "draw_stop", "status",
        "attempt", "seconds", "host",
    ),
    "failures": (
        "checkpoint", "metric", "label", "start", "stop", "draw_start", "draw_stop",
        "failure_class", "failure_message", "failure_hint",
    ),
}  # fmt: skip


def connect(tables: Mapping[str, pa.Table | Dataset]) -> duckdb.DuckDBPyConnection:
    """Open a locked in-memory database with the tables as views.

    ``failures`` is derived from ``units`` unless it is given.
    """
    connection = duckdb.connect(
        ":memory:",
        config={
            "temp_directory": "",  # spilling would write files
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",  # or SQL would see our variables
        },
    )
    for name, table in tables.items():
        connection.register(name, table)
    if "units" in tables and "failures" not in tables:
        connection.execute(
            "CREATE TEMP VIEW failures AS "
            "SELECT * FROM units WHERE status = 'failed' AND NOT superseded"
        )
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def run_sql(
    connection: duckdb.DuckDBPyConnection, sql: str, *, limit: int | None = None
) -> pa.Table:
    """Run one reading statement.

    Returns:
        At most ``limit`` rows; ``is_truncated`` tells whether there were more.

    Raises:
        QueryError: The statement does not read, is not SQL, or names what does not exist.
    """
    try:
        statements = connection.extract_statements(sql)
        kinds = [statement.type for statement in statements]
    except duckdb.Error as error:
        raise QueryError(_reason(error)) from error
    except ValueError as error:  # a kind of statement that DuckDB's Python does not know
        raise QueryError(f"a query is {_ALLOWED}; found another in {sql!r}") from error
    if kinds != [duckdb.StatementType.SELECT]:
        found = " then ".join(str(kind).rpartition(".")[2] for kind in kinds) or "nothing"
        raise QueryError(f"a query is {_ALLOWED}; found {found} in {sql!r}")
    return _rows(connection, statements[0].query, [], limit)


def run_filters(
    connection: duckdb.DuckDBPyConnection,
    view: str,
    *,
    filters: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    sort: str | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Rows of a view that pass every filter.

    A filter is a column, one of ``= != > >= < <= ~ !~`` and a value. ``~`` finds text without
    regard to case, ``=null`` finds missing values, ``!=`` and ``!~`` keep them; order comparisons
    leave out NaN. Values reach the database as parameters, never as SQL.

    Args:
        connection: From ``connect``.
        view: The view's name.
        filters: All must hold.
        columns: Columns to show, in this order; None for all.
        sort: A column to sort by, with '-' in front for the largest first; missing values last.
        limit: At most so many rows; ``is_truncated`` tells whether there were more.

    Raises:
        QueryError: Unknown view or column, or a filter that cannot be read.
    """
    types = _column_types(connection, view)
    conditions, values = [], []
    for text in filters:
        condition, bound = _condition(text, types, view)
        conditions.append(condition)
        values.extend(bound)
    shown = [_checked(name, types, view) for name in columns] if columns else list(types)
    sql = f"SELECT {', '.join(map(_quoted, shown))} FROM {_quoted(view)}"
    if conditions:
        sql += f" WHERE {' AND '.join(conditions)}"
    if sort is not None:
        descending = sort not in types and sort.startswith("-")
        name = _checked(sort.removeprefix("-") if descending else sort, types, view)
        sql += f" ORDER BY {_quoted(name)} {'DESC' if descending else 'ASC'} NULLS LAST"
    return _rows(connection, sql, values, limit)


def is_truncated(table: pa.Table) -> bool:
    """Whether the limit cut off rows of this answer."""
    return _TRUNCATED in (table.schema.metadata or {})


def view_columns(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    """Columns of every view of this run, by view."""
    rows = connection.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal "
        "ORDER BY table_name, column_index"
    ).fetchall()
    found: dict[str, list[str]] = {}
    for view, column in rows:
        found.setdefault(view, []).append(column)
    return found


def _rows(
    connection: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any], limit: int | None
) -> pa.Table:
    """The first rows of the answer, marked where there were more."""
    batches, num_rows = [], 0
    try:
        # Streamed, and closed early: a huge answer costs no more than the rows that are asked for.
        with connection.sql(sql, params=list(values)).to_arrow_reader(_BATCH_ROWS) as reader:
            for batch in reader:
                batches.append(batch)
                num_rows += batch.num_rows
                if limit is not None and num_rows > limit:
                    break
            table = pa.Table.from_batches(batches, schema=reader.schema)
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # the latter two while streaming
        raise QueryError(_explained(error, connection)) from error
    if limit is None or num_rows <= limit:
        return table
    return table.slice(0, limit).replace_schema_metadata({_TRUNCATED: b"true"})


def _condition(text: str, types: Mapping[str, str], view: str) -> tuple[str, list[Any]]:
    """SQL condition with placeholders, and their values, for one filter."""
    name, operator, value = _split(text, types, view)
    column, kind = _quoted(name), types[name]
    if operator in ("~", "!~"):
        found = f"contains(lower(CAST({column} AS VARCHAR)), lower(?))"
        return (found if operator == "~" else f"coalesce(NOT {found}, true)"), [value]
    if value == "null" and operator in ("=", "!="):
        return f"{column} IS {'NOT ' if operator == '!=' else ''}NULL", []
    bound = _converted(value, kind, text)
    if operator == "!=":
        return f"{column} IS DISTINCT FROM ?", [bound]
    if operator != "=" and kind in _FLOATS:
        # DuckDB orders NaN above every number.
        return f"({column} {operator} ? AND NOT isnan({column}))", [bound]
    return f"{column} {operator} ?", [bound]


def _split(text: str, types: Mapping[str, str], view: str) -> tuple[str, str, str]:
    """Column, operator and value of a filter; the longest column that fits wins."""
    for name in sorted(types, key=len, reverse=True):
        match = _OPERATOR.match(text, len(name)) if text.startswith(name) else None
        if match is not None:
            return name, match[1], text[match.end() :]
    match = _OPERATOR.search(text)
    if match is None or match.start() == 0:
        raise QueryError(
            f"cannot read the filter {text!r}: expected COLUMN, one of = != > >= < <= ~ !~, VALUE, "
            "such as status!=ok"
        )
    return _checked(text[: match.start()], types, view), match[1], text[match.end() :]


_OPERATOR = re.compile(r"\s*(!=|>=|<=|!~|=|>|<|~)\s*")
_FLOATS = frozenset({"DOUBLE", "FLOAT"})
_INTEGERS = frozenset({"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UBIGINT", "HUGEINT"})
_TRUTH = {"true": True, "false": False}


def _converted(value: str, kind: str, text: str) -> Any:
    """The value as the column's type, so that comparison is by number where it can be."""
    try:
        if kind in _FLOATS:
            return float(value)
        if kind in _INTEGERS:
            number = float(value)
            return int(value) if number.is_integer() and value.lstrip("+-").isdigit() else number
        if kind == "BOOLEAN":
            return _TRUTH[value.lower()]
    except (ValueError, KeyError):
        expected = "true or false" if kind == "BOOLEAN" else "a number"
        raise QueryError(
            f"cannot use the filter {text!r}: the column holds {kind}, so expected {expected} "
            f"or null, found {value!r}"
        ) from None
    return value


def _column_types(connection: duckdb.DuckDBPyConnection, view: str) -> dict[str, str]:
    """Type of every column of a view."""
    views = view_columns(connection)
    if view not in views:
        reason = f"{VIEWS[view]}; there is none yet" if view in VIEWS else "unknown"
        raise QueryError(f"view {view!r}: {reason}.{did_you_mean(view, views)} {_listed(views)}")
    rows = connection.execute(f"DESCRIBE {_quoted(view)}").fetchall()
    return {row[0]: row[1] for row in rows}


def _checked(name: str, types: Iterable[str], view: str) -> str:
    if name in types:
        return name
    raise QueryError(f"unknown column {name!r} in {view!r}.{did_you_mean(name, types)}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _reason(error: Exception) -> str:
    """DuckDB's words without its guesses among system tables."""
    text = re.sub(r"\nDid you mean \"[^\n]*", "", str(error))
    return re.sub(r"\nCandidate bindings: [^\n]*", "", text).strip()


def _listed(views: Iterable[str]) -> str:
    return f"Views: {', '.join(sorted(views)) or 'none'}."


def _explained(error: Exception, connection: duckdb.DuckDBPyConnection) -> str:
    """The reason, then what there is: views, and the nearest names of theirs."""
    reason, views = _reason(error), view_columns(connection)
    if isinstance(error, duckdb.PermissionException):
        return f"{reason}\nA query reads this run's tables and nothing else. {_listed(views)}"
    names = set(views).union(*views.values())
    asked = re.findall(r'"([^"\n]+)"|name (\S+) does not exist', reason.partition("\n")[0])
    near = [m for a in asked for m in difflib.get_close_matches(a[0] or a[1], sorted(names), n=2)]
    hint = f" Nearest names: {', '.join(dict.fromkeys(near))}." if near else ""
    return f"{reason}\n{_listed(views)}{hint}"
