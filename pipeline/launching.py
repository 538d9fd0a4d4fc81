"""What ``launch``, ``resume``, ``train`` and ``demo`` share: run, reduce, report, and say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.command import relative, shown
from pipeline.console import Console, ProgressDisplay
from pipeline.durations import duration
from pipeline.errors import EXIT_FAILED_UNITS, EXIT_INTERRUPTED, EXIT_OK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.run import Run
    from pipeline.specs import Unresolved
    from pipeline.standing import Absent

MAX_NOTES = 12  # beyond, the notes of single checkpoints are left to --json


def launch_run(
    console: Console,
    run: Run,
    *,
    on: str,
    retry_failed: bool = False,
    train_only: bool = False,
    launch_id: str | None = None,
) -> int:
    """Run what is to do, then reduce and report; say what happened and what to do next."""
    from pipeline.labels import counted
    from pipeline.outputs import headline, write_outputs
    from pipeline.run import execute

    display = ProgressDisplay(console)
    try:
        result = execute(
            run, display, on=on, retry_failed=retry_failed, train_only=train_only,
            launch_id=launch_id,
        )  # fmt: skip
    finally:
        display.close()
    for line in result.nondeterminism:
        console.warn(f"nondeterminism: {line}")
    folder = relative(run.store.uri)
    resume = f"flatcensus resume {shown(folder)}" + ("" if on == "local" else f" --on {shown(on)}")
    if result.interrupted:
        console.warn(f"interrupted after {result.committed} units; nothing is lost")
        console.next_step(resume, "continue")
        return EXIT_INTERRUPTED
    if result.committed == 0 and result.failed == 0:
        console.say(f"nothing is left to do in {folder}")
    else:
        console.say(
            f"{counted(result.committed, 'unit')} committed, {result.failed} failed, "
            f"{result.retried} retried, {result.lost} lost with their slot, "
            f"in {duration(result.seconds)}"
        )
    current, tables = run.reduce()
    if not train_only:
        files = write_outputs(run, current, tables)
        _show_results(console, tables, headline(tables), files)
        show_bounds(console, folder, tables.bounds)
    show_unresolved(console, current.unresolved)
    if current.num_failed:
        failures = f"flatcensus query {shown(folder)} failures"
        console.warn(f"{current.num_failed} failed: {failures}")
        if current.num_failed > len(current.unresolved):
            console.next_step(resume, "try the failed ones again")
        else:  # the run folder keeps the manifest as it was
            console.next_step(failures, "mend the causes, then launch the manifest again")
        return EXIT_FAILED_UNITS
    if train_only:
        console.next_step(resume, "measure the trained checkpoints")
    else:
        console.next_step(f"flatcensus query {shown(folder)}", "or open the report above")
    return EXIT_OK


def _show_results(console: Console, tables: Any, lines: list[str], files: list[str]) -> None:
    shown = ["x", "y", "group", "method", "r", "ci_low", "ci_high", "n", "n_missing"]
    pooled = tables.correlations["group"].isin(["all", "within"])
    if len(tables.correlations):
        console.table(tables.correlations[pooled][shown], title="correlations over checkpoints")
    elif console.as_json:
        console.table(tables.summary)
    for line in lines:
        console.say(line)
    console.say(f"report: {relative(files[0])}")


def show_unresolved(console: Console, unresolved: Sequence[Absent | Unresolved]) -> None:
    """Warn of checkpoints that cannot be had, each with its reason."""
    for missing in unresolved[:MAX_NOTES]:
        console.warn(f"{missing.checkpoint}: {missing.reason}")
    if len(unresolved) > MAX_NOTES:
        console.warn(f"and {len(unresolved) - MAX_NOTES} more checkpoints cannot be had")


def show_bounds(console: Console, run: str, bounds: Any, *, when: str = "") -> None:
    """How many inequalities hold, and an alarm if one fails that cannot."""
    from pipeline.bounds_summary import bounds_headline, num_violated
    from pipeline.labels import counted

    if line := bounds_headline(bounds):
        console.say(line + when)
    if number := num_violated(bounds):
        console.warn(
            f"{counted(number, 'check')} of theorems failed although the conditions are met: a bug "
            f"or a numerical problem. See: flatcensus query {shown(run)} bounds holds=no "
            "is_theorem=true conditions_met=true"
        )
