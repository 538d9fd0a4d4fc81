"""What ``flatcensus plan`` shows: a table that stays readable, totals, and what is not known."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.console import Console
from pipeline.known_specs import stale_lines
from pipeline.launching import MAX_NOTES, show_unresolved
from pipeline.plan import Plan
from pipeline.plan_summary import CostSummary, cost_lines, family_table, summarize_cost
from pipeline.progress import numbered_notes, plan_table
from pipeline.run import Run

MAX_LINES = 40  # of a table by checkpoint; beyond, one by family and measurement


def show_plan(console: Console, run: Run, plan: Plan) -> None:
    """Print a plan: everything as JSON lines, the last one the totals; or what a reader needs."""
    cost = plan_cost(run, plan)
    title = f"plan of {run.manifest.name}"
    table = plan_table(plan)
    if console.as_json:
        console.table(table)
        absent = [asdict(item) for item in plan.unresolved]
        console.data({"totals": asdict(cost), "unresolved": absent})
    elif len(table) <= MAX_LINES:
        table, notes = numbered_notes(table)
        console.table(table, title=title)
        for note in notes:
            console.say(note)
    else:
        console.table(family_table(plan), title=f"{title}, by family; --json has every checkpoint")
        _, notes = numbered_notes(table)
        for note in notes[:MAX_NOTES]:
            console.say(note)
        if len(notes) > MAX_NOTES:
            console.say(f"{len(notes) - MAX_NOTES} further notes are in --json")
    if plan.units:
        for line in cost_lines(cost):
            console.say(line)
    show_unresolved(console, plan.unresolved)
    stale = stale_lines(plan, run.store)
    for line in stale[:MAX_NOTES]:
        console.warn(line)
    if len(stale) > MAX_NOTES:
        console.warn(f"and {len(stale) - MAX_NOTES} more stale results, kept and not used")


def plan_cost(run: Run, plan: Plan) -> CostSummary:
    """The totals of a run's plan, with file sizes where the lock or the hub told them."""
    sizes = {
        key.removeprefix("timm:").partition("@")[0]: sum(file.size or 0 for file in files)
        for key, files in plan.files.items()
        if key.startswith("timm:") and all(file.size is not None for file in files)
    }
    manifest = run.manifest
    return summarize_cost(plan, manifest.resources, itemsize=manifest.itemsize, file_sizes=sizes)
