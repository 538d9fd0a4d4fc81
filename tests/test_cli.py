"""Every command on a finished run: what it prints where, its exit code, what it says to do next."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer.main
from commands import Answer, call, files
from populations import save_mlp, write_manifest

from pipeline.cli import app
from pipeline.console import Console, format_cell

# A knob belongs in the manifest: options only say where, how to print, and which rows.
OPTIONS = {
    "correlate": ["--json"],
    "demo": ["--json", "--on", "--run"],
    "doctor": ["--json", "--on", "--run"],
    "fetch": ["--dry-run", "--json", "--run"],
    "launch": ["--detach", "--json", "--on", "--run"],
    "list": ["--json"],
    "lock": ["--json", "--update"],
    "logs": ["--follow", "--launch"],
    "plan": ["--json", "--run"],
    "query": ["--columns", "--json", "--limit", "--sort"],
    "report": ["--json"],
    "resume": ["--detach", "--json", "--on"],
    "status": ["--json"],
    "stop": ["--json", "--now"],
    "train": ["--json", "--on", "--run"],
    "compact": ["--json"],
    "verify": ["--json"],
}
HEAVY = ("torch", "timm", "ray", "numpy", "pandas", "pyarrow", "duckdb", "matplotlib", "scipy")
MEASUREMENTS = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 2
[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("with space")
    for seed in range(3):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    return write_manifest(folder / "tiny.toml", samples=16, measurements=MEASUREMENTS)


@pytest.fixture(scope="module")
def first(manifest: Path) -> Answer:
    return call("launch", manifest, "--run", manifest.parent / "run", "--on", "inline")


@pytest.fixture
def run(manifest: Path, first: Answer) -> Path:
    assert first.code == 0, first.err
    return manifest.parent / "run"


def test_options_are_pinned():
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        name: sorted(o for p in command.params for o in p.opts if o.startswith("--"))
        for name, command in commands.items()
    }
    assert found == OPTIONS


def test_help_of_every_command_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from pipeline.cli import app\n"
        f"for name in {[None, *OPTIONS]!r}:\n"
        "    result = CliRunner().invoke(app, [name, '--help'] if name else ['--help'])\n"
        "    assert result.exit_code == 0 and 'Usage:' in result.output, (name, result.output)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_and_option_has_a_help_text():
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            if parameter.name != "help":
                assert parameter.help, (name, parameter.name)  # pyright: ignore


def test_plan_writes_nothing_and_shows_reasons_and_a_range_of_times(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a")
    path, before = write_manifest(tmp_path / "m.toml"), files(tmp_path)
    answer = call("plan", path, "--run", tmp_path / "run")
    assert answer.code == 0
    assert "normalized_mls" in answer.out
    assert "no result with these settings" in answer.out
    assert "1 unit to do, about " in answer.err
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert answer.next_step == f"flatcensus launch {path} --run {tmp_path / 'run'}"


def test_launch_prints_correlations_and_where_the_report_is(first: Answer, run: Path):
    assert "normalized_mls  adaptive_sharpness" in first.out
    assert "6 units committed, 0 failed" in first.err
    assert (run / "report.html").is_file()
    assert first.next_step == f"flatcensus query {shlex.quote(str(run))}"


def test_second_launch_says_that_nothing_is_left_to_do_and_changes_no_table(
    manifest: Path, run: Path
):
    tables = files(run / "tables")
    answer = call("launch", manifest, "--run", run, "--on", "inline")
    assert answer.code == 0
    assert f"nothing is left to do in {run}" in answer.err
    assert files(run / "tables") == tables


def test_plan_of_a_finished_run_leads_to_its_report(manifest: Path, run: Path):
    answer = call("plan", manifest, "--run", run)
    assert "nothing is left to do" in answer.err
    assert shlex.split(answer.next_step) == ["flatcensus", "report", str(run)]


def test_resume_needs_the_folder_alone(run: Path):
    answer = call("resume", run, "--on", "inline")
    assert (answer.code, "nothing is left to do" in answer.err) == (0, True)


def test_status_counts_by_measurement(run: Path):
    answer = call("status", run, "--json")
    assert answer.code == 0
    assert answer.records == [
        {"measurement": name, "done": 3, "todo": 0, "failed": 0, "waiting": 0, "units_todo": 0}
        for name in ("normalized_mls", "adaptive_sharpness")
    ]
    assert shlex.split(answer.next_step) == ["flatcensus", "report", str(run)]


def test_query_shows_the_summary_and_says_how_to_see_the_rest(run: Path):
    answer = call("query", run)
    header, *lines = answer.out.splitlines()
    assert header.split()[:4] == ["checkpoint", "series", "value", "stderr"]
    assert len(lines) == 3 * 4
    everything = shlex.split(answer.next_step)
    assert everything == ["flatcensus", "query", str(run), "select * from summary"]
    assert "status_text" in call(*everything[1:]).out


def test_query_by_filters_and_by_sql_agree(run: Path):
    by_filters = call(
        "query", run, "summary", "series=mls", "value>0", "--columns", "checkpoint,value",
        "--sort", "-value", "--json",
    )  # fmt: skip
    by_sql = call(
        "query", run, "--json",
        "select checkpoint, value from summary where series = 'mls' order by value desc",
    )  # fmt: skip
    assert by_filters.records == by_sql.records
    assert len(by_sql.records) == 3


def test_query_says_when_the_limit_cut_rows(run: Path):
    answer = call("query", run, "measurements", "--limit", "2", "--json")
    assert len(answer.records) == 2
    assert "more than 2 rows" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sumary"], "Did you mean 'summary'?"),
        (["summary", "valu>1"], "Did you mean 'value'?"),
        (["summary", "--sort", "valu"], "Did you mean 'value'?"),
        (["drop table summary"], "found DROP"),
        (["select * from summary", "value>1"], "filters, --columns and --sort are for a view"),
    ],
)
def test_queries_that_cannot_be_run_have_exit_code_2(run: Path, arguments: list[str], words: str):
    answer = call("query", run, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


def test_queries_need_no_permission_to_write(run: Path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert call("query", run).code == call("correlate", run).code == call("status", run).code == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_correlate_prints_the_table_of_the_run(run: Path):
    answer = call("correlate", run, "--json")
    published = pd.read_parquet(run / "tables/correlations.parquet")
    assert [r["r"] for r in answer.records] == pytest.approx(list(published["r"]), abs=1e-9)
    assert {r["n_missing"] for r in answer.records} == {0}


def test_report_prints_the_files_it_wrote(run: Path):
    answer = call("report", run)
    written = answer.out.splitlines()
    assert written[0] == str(run / "report.html")
    assert all(Path(path).is_file() for path in written)
    assert call("report", run, "--json").records[0]["files"] == written


def test_verify_reads_every_shard_and_sets_damaged_ones_aside(run: Path, tmp_path: Path):
    assert "6 sound shards, 0 damaged" in call("verify", run).err
    copied = tmp_path / "copy"
    for name, content in files(run).items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(content)
    victim = sorted(copied.rglob("shards/*/*.parquet"))[2]
    victim.write_bytes(victim.read_bytes().replace(b"mlp", b"mlq"))
    answer = call("verify", copied, "--json")
    assert answer.code == 3
    (counts,) = answer.records
    (record,) = counts["damaged"]
    assert record["key"] == str(victim.relative_to(copied))
    assert (copied / record["moved_to"]).is_file()
    assert (counts["sound_shards"], counts["set_aside_before"]) == (5, 0)
    assert answer.next_step == f"flatcensus resume {copied}"
    again = call("verify", copied)
    assert again.code == 0
    assert "5 sound shards, 0 damaged and set aside, 1 file in quarantine/ from before" in again.err


@pytest.mark.parametrize("what", ["metrics", "datasets", "networks", "families"])
def test_list_names_what_a_manifest_can_name(what: str):
    names = {next(iter(r.values())) for r in call("list", what, "--json").records}
    expected = {
        "metrics": "adaptive_sharpness", "datasets": "digits", "networks": "vit",
        "families": "vision_transformer",
    }  # fmt: skip
    assert expected[what] in names


def test_list_models_takes_a_wildcard():
    records = call("list", "models", "vit_tiny_patch16_224*", "--json").records
    assert records
    assert all(r["model"].startswith("vit_tiny_patch16_224") for r in records)


def test_list_of_something_else_names_what_there_is():
    answer = call("list", "metric")
    assert answer.code == 2
    assert "Did you mean 'metrics'?" in answer.err


def test_doctor_checks_the_executor_it_is_asked_about():
    answer = call("doctor", "--on", "inline", "--json")
    assert answer.code == 0
    states = {r["check"]: r["state"] for r in answer.records}
    assert states["executor inline"] == states["digits"] == "ok"
    assert answer.next_step == "flatcensus demo --on inline"


def test_json_leaves_stdout_to_json(manifest: Path, run: Path):
    for command in (
        ["plan", manifest, "--run", run],
        ["launch", manifest, "--run", run, "--on", "inline"],
        ["resume", run, "--on", "inline"],
        ["query", run, "measurements"],
        ["query", run, "failures"],
        ["correlate", run],
        ["report", run],
        ["verify", run],
        ["status", run],
    ):
        answer = call(*command, "--json")
        assert answer.code == 0, (command, answer.err)
        assert all(isinstance(record, dict) for record in answer.records), command


def test_the_entry_point_leaves_a_closed_pipe_quietly(run: Path):
    command = [sys.executable, "-c", "from pipeline.cli import main; main()"]
    process = subprocess.Popen(
        [*command, "query", str(run), "measurements", "--limit", "5000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()  # as head does once it has seen enough
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert "Traceback" not in messages
    assert "Exception ignored" not in messages


def test_unexpected_errors_are_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr("pipeline.catalog.catalog", broken)
    answer = call("list", "metrics")
    assert answer.code == 1
    (line,) = answer.err.splitlines()
    assert line.startswith("error: unexpected ZeroDivisionError: broken on purpose. ")
    monkeypatch.setenv("FLATCENSUS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call("list", "metrics")


def test_interrupts_have_exit_code_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.catalog.catalog", interrupted)
    assert call("list", "metrics").code == 130


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (float("nan"), "-"), (None, "-"), (12, "12"), ("a[b]", "a[b]")],
)
def test_cells_have_the_digits_that_matter(value: object, text: str):
    assert format_cell(value) == text


def test_names_with_markup_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    Console().table(pd.DataFrame([{"checkpoint": "[red]x[/red]", "value": 1.0}]))
    assert "[red]x[/red]" in capsys.readouterr().out


def test_tables_of_nan_are_valid_json(capsys: pytest.CaptureFixture[str]):
    Console(as_json=True).table(pd.DataFrame([{"value": float("nan")}]))
    assert json.loads(capsys.readouterr().out) == {"value": None}


def test_json_has_all_digits_and_null_for_what_is_missing(capsys: pytest.CaptureFixture[str]):
    frame = pd.DataFrame(
        {"a": [3.247554157196029e-07, 1e-300, float("nan"), float("inf")], "n": [1, 2, 3, 4]}
    )
    Console(as_json=True).table(frame.astype({"n": "int64"}))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["a"] for line in found] == [3.247554157196029e-07, 1e-300, None, None]
    assert [line["n"] for line in found] == [1, 2, 3, 4]
