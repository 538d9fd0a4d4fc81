"""Queries: what SQL may see and may not reach, filters, and errors that name the way on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from pipeline.errors import QueryError
from pipeline.query import (
    VIEWS,
    connect,
    is_truncated,
    run_filters,
    run_sql,
    view_columns,
)
from pipeline.schema import MEASUREMENT_SCHEMA, UNITS_SCHEMA, Failure, UnitRecord
from pipeline.unit_table import record_table, units_table

ODD = "größe \"模型\" 'x'"


def _measurements() -> pa.Table:
    """Two shards' worth of rows, so that dictionaries differ between chunks."""
    common = {
        "spec_key": "s",
        "metric": "m",
        "label": "m",
        "metric_version": 1,
        "code_version": "1",
        "torch_version": "2",
        "quantity": "mls",
        "status": "ok",
        "num_iterations": 1,
        "num_probes": 0,
        "forward_equivalents": 1.0,
        "seconds": 0.1,
    }
    lines = [
        [
            {"checkpoint": "vit_tiny", "sample": 0, "value": 1.5, "layer": "head"},
            {"checkpoint": "ViT_base", "sample": 1, "value": math.nan, "layer": None},
        ],
        [
            {"checkpoint": "o'neil; DROP VIEW measurements", "sample": 2, "value": 10.0},
            {
                "checkpoint": ODD,
                "sample": 3,
                "value": -2.0,
                "layer": "head",
                "status": "not_finite",
            },
        ],
    ]
    return pa.concat_tables(
        pa.Table.from_pylist([common | line for line in part], schema=MEASUREMENT_SCHEMA)
        for part in lines
    )


def _unit(start: int, stop: int, *, failed: bool = False, **changes: object) -> UnitRecord:
    failure = Failure(class_="oom", type="E", message="m'\"ü", hint="h") if failed else None
    fields = {
        "spec_key": "s",
        "start": start,
        "stop": stop,
        "checkpoint": "vit_tiny",
        "metric": "m",
        "label": "m",
        "status": "failed" if failed else "ok",
        "failure": failure,
        "host": "h",
        "device": "cpu",
        "pid": 1,
        "threads": 1,
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:01+00:00",
        "seconds": 1.0,
        "versions": {"torch": "2", "python": "3"},
    }
    return UnitRecord.model_validate(fields | changes)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    tables = {
        "measurements": _measurements(),
        "units": units_table(record_table([_unit(0, 2), _unit(2, 4, failed=True)])),
        "summary": pa.table({ODD: [1, 2], "a=b": ["x", "y"], "a": ["z", "z"], "ok": [True, False]}),
    }
    with connect(tables) as connection:
        yield connection


def test_sql_reads_the_views(connection: duckdb.DuckDBPyConnection):
    answer = run_sql(
        connection, "SELECT layer, count(*) AS n FROM measurements GROUP BY 1 ORDER BY 1"
    )
    assert answer.to_pylist() == [{"layer": "head", "n": 2}, {"layer": None, "n": 2}]
    assert run_sql(connection, "SELECT failure_class FROM failures").to_pylist() == [
        {"failure_class": "oom"}
    ]
    assert set(view_columns(connection)) == {"measurements", "units", "summary", "failures"}
    assert set(view_columns(connection)) <= set(VIEWS)


@pytest.mark.parametrize(
    "sql",
    [
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a",
        "FROM measurements",
        "DESCRIBE measurements",
        "SHOW TABLES",
        "SUMMARIZE measurements",
        "SELECT 1; -- a comment",
        "PIVOT measurements ON layer IN ('head') USING count(*)",
        'SELECT \'a;b\', "größe ""模型"" \'x\'" FROM summary',
    ],
)
def test_reading_statements_are_run(connection: duckdb.DuckDBPyConnection, sql: str):
    assert run_sql(connection, sql, limit=5).num_rows > 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_blob('{file}')",
        "SELECT * FROM read_parquet('{file}')",
        "SELECT * FROM read_json('{file}')",
        "SELECT * FROM sniff_csv('{file}')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_parquet('https://example.com/x.parquet')",
        "SELECT * FROM read_csv('s3://bucket/x.csv')",
        "SELECT * FROM query('SELECT * FROM read_csv(''{file}'')')",
        "WITH a AS (FROM '{file}') FROM a",
        "SELECT getenv('HOME')",
        "SELECT * FROM duckdb_secrets()",
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "COPY measurements FROM '{file}'",
        "EXPORT DATABASE '{folder}/out'",
        "IMPORT DATABASE '{folder}'",
        "ATTACH '{folder}/out.db'",
        "ATTACH ':memory:' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "LOAD '{file}'",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET threads = 1",
        "RESET threads",
        "PRAGMA threads = 1",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "CREATE TABLE t AS SELECT 1",
        "CREATE SECRET s (TYPE s3)",
        "CREATE MACRO m() AS 1",
        "DROP VIEW measurements",
        "INSERT INTO measurements DEFAULT VALUES",
        "DELETE FROM measurements",
        "WITH a AS (DELETE FROM measurements RETURNING *) SELECT * FROM a",
        "PREPARE p AS SELECT 1",
        "EXPLAIN ANALYZE SELECT 1",
        "USE memory",
        "CHECKPOINT",
        "SELECT * FROM arrow_scan(1, 2, 3)",
        "SELECT * FROM arrow_scan(1::POINTER, 2::POINTER, 3::POINTER)",
        "SELECT * FROM pandas_scan(1::UBIGINT::POINTER)",
        "SELECT * FROM python_map_function(1)",
        "SELECT * FROM read_csv_auto('{file}')",
        "SELECT * FROM read_json_objects('{file}')",
        "SELECT * FROM read_text(['{file}'])",
        "SELECT * FROM read_text('file://{file}')",
        "SELECT (SELECT content FROM read_text('{file}'))",
        "SELECT * FROM read_blob('/proc/self/environ')",
        "SELECT * FROM parquet_metadata('{file}')",
        "SELECT * FROM parquet_schema('{file}')",
        "SELECT * FROM parquet_kv_metadata('{file}')",
        'SELECT * FROM "{file}"',
        'SELECT * FROM main."{file}"',
        "SELECT * FROM query_table('{file}')",
        "SELECT * FROM json_execute_serialized_sql("
        "json_serialize_sql('SELECT * FROM read_csv(''{file}'')'))",
        "SELECT * FROM sqlite_scan('{file}', 't')",
        "SELECT * FROM postgres_scan('host=127.0.0.1', 'public', 't')",
        "SELECT * FROM iceberg_scan('{folder}')",
        "SELECT * FROM delta_scan('{folder}')",
        "SELECT * FROM st_read('{file}')",
        "SELECT * FROM read_xlsx('{file}')",
        "SELECT * FROM which_secret('s3://bucket', 's3')",
        "SELECT * FROM enable_logging(storage='file', storage_path='{folder}/log')",
        "SELECT * FROM enable_profiling(save_location='{folder}/profile.json')",
        "CALL enable_logging()",
        "CALL enable_profiling()",
        "DESCRIBE SELECT * FROM '{file}'",
        "SUMMARIZE '{file}'",
        "PIVOT '{file}' ON a USING count(*)",
        "EXPLAIN SELECT * FROM read_csv('{file}')",
        "COPY measurements TO '/dev/stdout'",
        "COPY (SELECT 1) TO PROGRAM 'touch {folder}/out'",
        "FORCE INSTALL httpfs FROM 'http://127.0.0.1/'",
        "UPDATE EXTENSIONS",
        "SET VARIABLE x = 1",
        "SELECT set_config('threads', '1', false)",
        "SELECT nextval('x')",
        "UPDATE measurements SET value = 1",
        "TRUNCATE measurements",
        "MERGE INTO measurements USING units ON true WHEN MATCHED THEN DELETE",
        "ALTER VIEW measurements RENAME TO x",
        "CREATE OR REPLACE TEMP VIEW measurements AS SELECT 1",
        "COMMENT ON VIEW measurements IS 'x'",
        "PRAGMA add_parquet_key('k', '0123456789112345')",
        "BEGIN",
        "VACUUM",
        "ANALYZE",
        "DETACH memory",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{folder}/out.csv'",
        "",
        "-- nothing",
        ";",
    ],
)
def test_everything_else_is_refused(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path, sql: str
):
    file = tmp_path / "secret.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(QueryError):
        run_sql(connection, sql.format(file=file, folder=tmp_path))
    assert list(tmp_path.iterdir()) == [file]
    assert run_sql(connection, "SELECT count(*) AS n FROM measurements").to_pylist() == [{"n": 4}]


def test_the_database_itself_is_locked_without_our_statement_check(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
):
    for sql in (
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        f"ATTACH '{tmp_path}/out.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET lock_configuration = false",
        "SET enable_external_access = true",
        f"SET temp_directory = '{tmp_path}'",
    ):
        with pytest.raises(duckdb.Error):
            connection.execute(sql)
    assert list(tmp_path.iterdir()) == []


def test_sql_does_not_see_python_variables(connection: duckdb.DuckDBPyConnection):
    hidden = pa.table({"a": [1]})
    with pytest.raises(QueryError, match="hidden does not exist"):
        run_sql(connection, "SELECT * FROM hidden")
    assert hidden.num_rows == 1


def test_refusal_of_files_says_what_a_query_is_for(connection: duckdb.DuckDBPyConnection):
    with pytest.raises(QueryError, match=r"this run's tables and nothing else.*Views: failures, m"):
        run_sql(connection, "SELECT * FROM read_csv('/etc/passwd')")
    with pytest.raises(QueryError, match=r"one SELECT, .* found COPY in .COPY"):
        run_sql(connection, "COPY (SELECT 1) TO '/tmp/x'")
    with pytest.raises(QueryError, match=r"one SELECT, .* found SELECT then SELECT"):
        run_sql(connection, "SELECT 1; SELECT 2")


def test_sql_errors_list_views_and_the_nearest_names(connection: duckdb.DuckDBPyConnection):
    with pytest.raises(QueryError, match=r"Views: .*Nearest names: spec_key"):
        run_sql(connection, "SELECT spec_kee FROM measurements")
    with pytest.raises(QueryError, match=r"measuremnts does not exist.*\n.*\n*.*") as caught:
        run_sql(connection, "SELECT * FROM measuremnts")
    assert "Nearest names: measurements" in str(caught.value)
    assert "pg_" not in str(caught.value)
    with pytest.raises(QueryError, match="syntax error"):
        run_sql(connection, "SELEKT 1")
    with pytest.raises(QueryError, match="Could not convert"):
        run_sql(connection, "SELECT CAST(checkpoint AS INT) FROM measurements")
    with pytest.raises(QueryError, match="Could not convert"):  # after the first rows
        run_sql(
            connection,
            "SELECT CAST(CASE WHEN x = 90000 THEN 'a' ELSE '1' END AS INT) FROM range(99999) t(x)",
        )
    with pytest.raises(QueryError, match="parameters"):
        run_sql(connection, "SELECT ?")


def test_limit_cuts_and_says_so(connection: duckdb.DuckDBPyConnection):
    for limit, truncated in ((0, True), (3, True), (4, False), (5, False), (None, False)):
        answer = run_sql(connection, "FROM measurements", limit=limit)
        assert answer.num_rows == min(4, 4 if limit is None else limit)
        assert is_truncated(answer) is truncated
    assert is_truncated(run_filters(connection, "measurements", limit=1))


def test_a_huge_answer_costs_only_the_rows_asked_for(connection: duckdb.DuckDBPyConnection):
    # 8e14 bytes if it were not streamed.
    answer = run_sql(connection, "SELECT * FROM range(100000000000000)", limit=7)
    assert answer.num_rows == 7
    assert run_sql(connection, "SELECT 1 AS x").to_pylist() == [{"x": 1}]


def _samples(connection: duckdb.DuckDBPyConnection, *filters: str) -> list[int]:
    rows = run_filters(connection, "measurements", filters=filters, sort="sample")
    return rows["sample"].to_pylist()


@pytest.mark.parametrize(
    ("filters", "samples"),
    [
        ([], [0, 1, 2, 3]),
        (["sample=2"], [2]),
        (["sample = 2"], [2]),
        (["sample!=2"], [0, 1, 3]),
        (["sample>=2", "sample<3"], [2]),
        (["sample>0.5"], [1, 2, 3]),
        (["value>1"], [0, 2]),
        (["value<1e1"], [0, 3]),
        (["value>=-2", "value<=1.5"], [0, 3]),
        (["value=nan"], [1]),
        (["layer=null"], [1, 2]),
        (["layer!=null"], [0, 3]),
        (["layer!=head"], [1, 2]),
        (["checkpoint~VIT"], [0, 1]),
        (["checkpoint!~VIT"], [2, 3]),
        (["layer!~HEAD"], [1, 2]),
        (["checkpoint~%"], []),
        (["checkpoint=vit_tiny"], [0]),
        (["checkpoint=o'neil; DROP VIEW measurements"], [2]),
        (["checkpoint=' OR 1=1 --"], []),
        ([f"checkpoint={ODD}"], [3]),
        (["checkpoint~模型\" '"], [3]),
        (["status!=ok"], [3]),
    ],
)
def test_filters_select_the_rows_they_name(
    connection: duckdb.DuckDBPyConnection, filters: list[str], samples: list[int]
):
    assert _samples(connection, *filters) == samples


def test_columns_and_sort_are_as_asked(connection: duckdb.DuckDBPyConnection):
    answer = run_filters(connection, "measurements", columns=["value", "sample"], sort="-sample")
    assert answer.column_names == ["value", "sample"]
    assert answer["sample"].to_pylist() == [3, 2, 1, 0]
    by_layer = run_filters(connection, "measurements", sort="-layer")["layer"].to_pylist()
    assert by_layer == ["head", "head", None, None]


def test_column_names_may_hold_quotes_unicode_and_operators(connection: duckdb.DuckDBPyConnection):
    def first(*filters: str) -> list[int]:
        return run_filters(connection, "summary", filters=filters, columns=[ODD])[ODD].to_pylist()

    assert first(f"{ODD}>1") == [2]
    assert first("a=b=x") == [1]
    assert first("a=b") == []
    assert first("a=z", "ok=true") == [1]
    assert run_filters(connection, "summary", sort=f"-{ODD}")[ODD].to_pylist() == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "measurments"}, "view 'measurments': unknown. Did you mean 'measurements'"),
        ({"view": "correlations"}, "view 'correlations': .* there is none yet"),
        ({"view": "duckdb_settings"}, "view .* unknown. .*Views: failures"),
        ({"filters": ["checkpiont=x"]}, "unknown column 'checkpiont'.* mean 'checkpoint'"),
        ({"filters": ["checkpoint"]}, "cannot read the filter 'checkpoint'"),
        ({"filters": ["=x"]}, "cannot read the filter"),
        ({"filters": ["sample>many"]}, "holds INTEGER, so expected a number.* found 'many'"),
        ({"filters": ["value=x"]}, "holds DOUBLE, so expected a number"),
        ({"columns": ["valu"]}, "unknown column 'valu'.* mean 'value'"),
        ({"sort": "-valu"}, "unknown column 'valu'.* mean 'value'"),
        ({"view": "summary", "filters": ["ok=maybe"]}, "expected true or false"),
    ],
)
def test_filter_errors_name_the_nearest(
    connection: duckdb.DuckDBPyConnection, arguments: dict[str, object], message: str
):
    arguments = {"view": "measurements"} | arguments
    with pytest.raises(QueryError, match=message):
        run_filters(connection, **arguments)  # pyright: ignore[reportArgumentType]


def test_filters_compare_integers_exactly(connection: duckdb.DuckDBPyConnection):
    big = 2**53 + 1  # the first integer that float64 cannot hold
    with connect({"summary": pa.table({"step": [big - 1, big]})}) as large:
        rows = run_filters(large, "summary", filters=[f"step={big}"])
    assert rows["step"].to_pylist() == [big]


def test_units_are_flat_with_json_for_what_is_nested():
    table = units_table(record_table([_unit(0, 2), _unit(2, 4, failed=True)]))
    assert table.schema.equals(UNITS_SCHEMA)
    done, failed = table.to_pylist()
    assert done["versions"] == '{"python": "3", "torch": "2"}'
    assert (done["status"], done["failure_class"], done["self_test"]) == ("ok", None, None)
    assert (failed["failure_class"], failed["failure_message"]) == ("oom", "m'\"ü")
    assert units_table(record_table([])).schema.equals(UNITS_SCHEMA)


def test_every_field_of_a_record_is_a_column():
    fields = set(UnitRecord.model_fields) - {"failure"}
    failure = {f"failure_{name.rstrip('_')}" for name in Failure.model_fields}
    assert set(UNITS_SCHEMA.names) == fields | failure | {"superseded"}


@pytest.mark.parametrize(
    ("others", "superseded"),
    [
        ([], False),
        ([_unit(0, 8)], True),
        ([_unit(0, 8, spec_key="other")], False),
        ([_unit(0, 4), _unit(4, 9)], True),
        ([_unit(0, 4), _unit(5, 8)], False),
        ([_unit(0, 8, failed=True, generation=1)], True),
        ([_unit(0, 4), _unit(4, 8, failed=True, finished_at="2026-01-02T00:00:00+00:00")], True),
        ([_unit(0, 4), _unit(4, 8, failed=True, finished_at="2025-01-02T00:00:00+00:00")], False),
    ],
)
def test_failures_count_until_their_whole_range_is_made_up_for(
    others: list[UnitRecord], superseded: bool
):
    table = units_table(record_table([_unit(0, 8, failed=True), *others]))
    assert table["superseded"].to_pylist()[0] is superseded
    with connect({"units": table}) as connection:
        failures = run_sql(connection, "SELECT start, generation FROM failures").to_pylist()
    assert ({"start": 0, "generation": 0} in failures) is not superseded
