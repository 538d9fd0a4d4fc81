"""The command line. Each command is a few steps from pipeline/run.py and their output.

Heavy imports (torch, ray, timm, pandas, matplotlib) happen inside the commands, so that ``--help``
answers at once. Knobs belong in the manifest; options here only say where and how to print.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from rich.markup import escape

from pipeline import cluster_commands, hub_commands, store_commands
from pipeline.cluster_commands import launch_detached
from pipeline.command import (
    DetachOption,
    JsonOption,
    ManifestArg,
    OnOption,
    RunArg,
    RunOption,
    relative,
    reported,
    shown,
)
from pipeline.console import Console
from pipeline.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED_UNITS,
    EXIT_OK,
    UsageError,
)
from pipeline.launching import launch_run, show_bounds, show_unresolved

app = typer.Typer(
    name="flatcensus",
    help="Audit networks for how flat their loss is and how strongly they compress.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``flatcensus`` command."""
    # timm decorates with it at import; nothing a user of this command could change.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    app()


@app.command()
@reported
def demo(run_folder: RunOption = None, on: OnOption = "local", as_json: JsonOption = False) -> int:
    """Train a small population on digits, audit it, write a report: minutes on a laptop."""
    from pipeline.demo import demo_manifest
    from pipeline.run import start_run

    console = Console(as_json=as_json)
    with demo_manifest() as path:
        run = start_run(path, run_folder)
    return launch_run(console, run, on=on)


@app.command("list")
@reported
def list_things(
    what: Annotated[str, typer.Argument(help="metrics, datasets, networks, families or models")],
    pattern: Annotated[str, typer.Argument(help="for models: a wildcard such as 'vit_*'")] = "*",
    as_json: JsonOption = False,
) -> int:
    """List what a manifest can name."""
    from pipeline.catalog import catalog

    console = Console(as_json=as_json)
    console.table(catalog(what, pattern))
    console.next_step("flatcensus plan MANIFEST", "check a manifest that names them")
    return EXIT_OK


@app.command()
@reported
def plan(manifest: ManifestArg, run_folder: RunOption = None, as_json: JsonOption = False) -> int:
    """Show what would run, why, and what it would cost. Runs nothing, writes nothing."""
    from pipeline.plan_view import show_plan
    from pipeline.run import start_run

    console = Console(as_json=as_json)
    run = start_run(manifest, run_folder)
    current = run.plan()
    show_plan(console, run, current)
    folder = shown(relative(run.store.uri))
    place = f" --run {shown(run_folder)}" if run_folder else ""
    again = f"flatcensus launch {shown(manifest)}{place}"
    if current.units:
        console.next_step(again, "run it")
    elif current.unresolved:
        console.say(f"nothing can be done, {current.num_failed} failed")
        console.next_step(again, "when the causes above are mended")
    elif current.num_failed:
        console.say(f"nothing is left to do, {current.num_failed} failed")
        console.next_step(f"flatcensus resume {folder}", "try the failed ones again")
    else:
        console.say("nothing is left to do")
        console.next_step(f"flatcensus report {folder}", "see what it gave")
    return EXIT_OK


app.command()(reported(hub_commands.lock))
app.command()(reported(hub_commands.fetch))


@app.command()
@reported
def train(
    manifest: ManifestArg,
    run_folder: RunOption = None,
    on: OnOption = "local",
    as_json: JsonOption = False,
) -> int:
    """Train the manifest's checkpoints, measure nothing. ``launch`` does both."""
    from pipeline.run import start_run

    run = start_run(manifest, run_folder)
    if not run.manifest.train:
        raise UsageError(f"{manifest} has no [[train]] table. Measure with: flatcensus launch")
    return launch_run(Console(as_json=as_json), run, on=on, train_only=True)


@app.command()
@reported
def launch(
    manifest: ManifestArg,
    run_folder: RunOption = None,
    on: OnOption = "local",
    detach: DetachOption = False,
    as_json: JsonOption = False,
) -> int:
    """Run a manifest to the end: train, measure, reduce, report. Again: continue."""
    from pipeline.run import start_run

    console, run = Console(as_json=as_json), start_run(manifest, run_folder)
    return launch_detached(console, run, on=on) if detach else launch_run(console, run, on=on)


@app.command()
@reported
def resume(
    run: RunArg,
    on: OnOption = "local",
    detach: DetachOption = False,
    as_json: JsonOption = False,
) -> int:
    """Continue a run from its folder alone, and try its failed units again."""
    from pipeline.run import open_run

    start = launch_detached if detach else launch_run
    return start(Console(as_json=as_json), open_run(run), on=on, retry_failed=True)


@app.command()
@reported
def status(run: RunArg, as_json: JsonOption = False) -> int:
    """Show what is done, to do and failed. Reads the run folder only."""
    from pipeline.console import table_of
    from pipeline.labels import counted
    from pipeline.launches import read_launches
    from pipeline.memo import published_table
    from pipeline.standing import LINE_COLUMNS, standing
    from pipeline.store import open_store

    console, store = Console(as_json=as_json), open_store(run)
    current = standing(store)
    if current is None:  # only now, because these take seconds to import
        from pipeline.progress import plan_standing
        from pipeline.run import open_run

        current = plan_standing(open_run(run).recall())
    launches = read_launches(store)
    console.table(table_of(current.lines(), list(LINE_COLUMNS)))
    show_unresolved(console, current.unresolved)
    if (bounds := published_table(store, "bounds")) is not None:
        show_bounds(console, run, bounds, when=", when last reduced")
    for line in cluster_commands.launch_lines(launches):
        console.say(line)
    running = [record for record in launches if cluster_commands.is_running(record)]
    if running and running[-1].job is not None:
        console.next_step(f"flatcensus logs {shown(run)} --follow", "watch it")
    elif current.num_failed:
        console.next_step(f"flatcensus query {shown(run)} failures", "why they failed")
    elif current.num_units:
        todo = f"{counted(current.num_units, 'unit')} to do"
        resume = cluster_commands.resume_command(run, launches[-1] if launches else None)
        console.next_step(resume, todo)
    else:
        console.next_step(f"flatcensus report {shown(run)}", "all done")
    return EXIT_FAILED_UNITS if current.num_failed else EXIT_OK


app.command()(reported(cluster_commands.logs))
app.command()(reported(cluster_commands.stop))


app.command()(reported(store_commands.verify))
app.command()(reported(store_commands.compact))


@app.command()
@reported
def query(
    run: RunArg,
    what: Annotated[
        str,
        typer.Argument(
            help="A view (summary, layers, bounds, measurements, correlations, ...) or SQL."
        ),
    ] = "summary",
    filters: Annotated[
        list[str] | None, typer.Argument(help="For a view: filters such as family=vit value>0.1")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="For a view: comma-separated columns.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option("--sort", help="For a view: column, with - in front descending.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows to print at most.")] = 50,
    as_json: JsonOption = False,
) -> int:
    """Ask a run by SQL or by filters."""
    from pipeline.memo import run_tables
    from pipeline.query import MAIN_COLUMNS, connect, is_truncated, run_filters, run_sql

    console = Console(as_json=as_json)
    connection, view = connect(run_tables(run)), what.strip()
    if view.isidentifier():
        usual = None if as_json else MAIN_COLUMNS.get(view)
        names = [c.strip() for c in columns.split(",")] if columns else usual
        result = run_filters(
            connection, view, filters=filters or (), columns=names, sort=sort, limit=limit
        )
    elif filters or columns or sort:
        raise UsageError(
            "filters, --columns and --sort are for a view, found them beside SQL: write them "
            f"into {what!r}, or name a view instead of it"
        )
    else:
        result = run_sql(connection, what, limit=limit)
    console.table(result.to_pandas())
    if is_truncated(result):
        console.warn(f"there are more than {limit} rows; raise --limit to see them")
    if view == "failures" and result.num_rows:
        console.next_step(f"flatcensus resume {shown(run)}", "when their causes are mended")
    elif view in MAIN_COLUMNS:
        console.next_step(f'flatcensus query {shown(run)} "select * from {view}"', "all columns")
    else:
        console.next_step(f"flatcensus report {shown(run)}", "tables and figures on one page")
    return EXIT_OK


@app.command()
@reported
def correlate(run: RunArg, as_json: JsonOption = False) -> int:
    """Print the correlations of the manifest with their confidence intervals."""
    from pipeline.memo import run_tables

    console = Console(as_json=as_json)
    correlations = run_tables(run)["correlations"].to_table().to_pandas()
    if correlations.empty:
        console.warn("the manifest names no pairs: add a [[correlations]] table with x and y")
    console.table(correlations)
    console.next_step(f"flatcensus report {shown(run)}", "the same with figures")
    return EXIT_OK


@app.command()
@reported
def report(run: RunArg, as_json: JsonOption = False) -> int:
    """Write tables, figures and one self-contained report.html into the run folder."""
    from pipeline.outputs import write_outputs
    from pipeline.run import open_run

    console = Console(as_json=as_json)
    opened = open_run(run)
    current, tables = opened.reduce()
    written = write_outputs(opened, current, tables)
    console.data({"report": written[0], "files": written})
    if not as_json:
        for place in written:
            console.out.print(escape(relative(place)))
    show_bounds(console, run, tables.bounds)
    if current.num_failed:
        console.next_step(f"flatcensus query {shown(run)} failures", "why some failed")
    else:
        console.next_step(f"flatcensus query {shown(run)}", "the numbers behind it")
    return EXIT_OK


@app.command()
@reported
def doctor(
    on: OnOption = "local",
    run_folder: Annotated[
        str | None, typer.Option("--run", help="A run that all nodes of the cluster must reach.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Check this machine, or with --on a cluster: versions, CPUs, GPUs, Ray, data sets, hub."""
    from pipeline.doctor import examine

    console = Console(as_json=as_json)
    findings = examine(on, run_folder)
    console.table(findings)
    bad = findings[findings["state"] == "fail"]
    if bad.empty:
        if on in ("local", "inline"):
            place = "" if on == "local" else f" --on {on}"
            console.next_step(f"flatcensus demo{place}", "a first run, from training to report")
        else:
            detached = f"flatcensus launch MANIFEST --run RUN --on {shown(on)} --detach"
            console.next_step(detached, "submit a run; RUN is a place that all nodes reach")
        return EXIT_OK
    if on != "inline":
        console.next_step("flatcensus doctor --on inline", "does this machine work without Ray?")
    return EXIT_ENVIRONMENT
