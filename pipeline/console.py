"""The only place that prints: data on stdout, everything else on stderr.

With ``--json`` stdout carries JSON alone. Progress is one bar weighted by predicted cost on a
terminal, and one line a minute elsewhere.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.outcome import Outcome
    from pipeline.plan import Plan
    from pipeline.specs import Task

LINE_SECONDS = 60.0
PIPE_WIDTH = 10_000
MAX_NOTES = 20  # failures shown while running; all of them are in the failures table


class Console:
    """Output of one command."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # Into a file or a pipe, tables keep their full width: readers there do not wrap.
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self.out = _Out(highlight=False, width=width)
        self.err = RichConsole(stderr=True, soft_wrap=True, highlight=False)

    def data(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """Print a value as JSON, if JSON was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, default=str, allow_nan=True) + "\n")

    def table(self, frame: pd.DataFrame, *, title: str | None = None) -> None:
        """Print a table: aligned text, or JSON lines."""
        if self.as_json:
            for record in frame.to_dict("records"):
                plain = {str(name): _plain(value) for name, value in record.items()}
                sys.stdout.write(json.dumps(plain, default=str) + "\n")
            return
        shown = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        numeric = [frame[name].dtype.kind in "iuf" for name in frame.columns]
        for name, right in zip(frame.columns, numeric, strict=True):
            shown.add_column(
                escape(str(name)), justify="right" if right else "left", overflow="fold"
            )
        for row in frame.itertuples(index=False):
            shown.add_row(*(escape(format_cell(value)) for value in row))
        self.out.print(shown)

    def say(self, text: str) -> None:
        """A line for the reader, not data."""
        self.err.print(escape(text))

    def warn(self, text: str) -> None:
        """Something the reader should not miss."""
        self.err.print(f"[yellow]{escape(text)}[/]")

    def error(self, text: str) -> None:
        """Why the command failed."""
        self.err.print(f"[red]error:[/] {escape(text)}")

    def next_step(self, command: str, why: str) -> None:
        """The next useful command, from the user's own arguments."""
        self.err.print(f"[dim]next:[/] {escape(command)}   [dim]# {escape(why)}[/]")


class _Out(RichConsole):
    """Stdout whose reader may leave early: cli.py then ends the command in peace."""

    def on_broken_pipe(self) -> None:
        """Rich would exit with code 1."""
        raise BrokenPipeError


def _plain(value: object) -> object:
    """A cell as JSON has it, with all its digits: null for what is missing or infinite."""
    item = getattr(value, "item", None)  # of numpy's scalars
    value = item() if callable(item) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if type(value).__name__ in ("NaTType", "NAType") else value


def format_cell(value: object) -> str:
    """A number with the digits that matter, or text."""
    if isinstance(value, float):
        return f"{value:.4g}" if value == value else "-"
    return "-" if value is None else str(value)


def table_of(records: Iterable[Mapping[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    """A frame from records, with these columns even if there is none."""
    import pandas as pd

    return pd.DataFrame(list(records), columns=list(columns))


class ProgressDisplay:
    """Shows a launch: an Observer of the driver."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.total = self.done = 0.0
        self.units = self.finished = self.failed = self.notes = self.num_plans = 0
        self.started = self.last_line = time.monotonic()

    def planned(self, plan: Plan, num_slots: int) -> None:
        """There is a new plan: its units are all that is left."""
        from pipeline.durations import duration
        from pipeline.labels import counted

        self.total = self.done + plan.predicted_seconds
        self.units = self.finished + len(plan.units)
        if self.num_plans and time.monotonic() - self.last_line < LINE_SECONDS:
            return  # plans may follow each other quickly
        self.num_plans += 1
        self.last_line = time.monotonic()
        reasons = Counter(item.reason for item in plan.specs if item.todo)
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
        slots = f"{num_slots} slot{'s' if num_slots != 1 else ''}"
        estimate = duration(plan.predicted_seconds / num_slots)
        self.console.say(f"{counted(len(plan.units), 'unit')} on {slots}, about {estimate}: {why}")
        if self.bar is None and self.console.err.is_terminal and not self.console.as_json:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[units]}"), TimeRemainingColumn(),
                console=self.console.err, transient=True,
            )  # fmt: skip
            self.bar.add_task("measuring", total=self.total, units="")
            self.bar.start()

    def ended(self, task: Task, outcome: Outcome | None, note: str) -> None:
        """An attempt ended: move on, and say what went wrong."""
        settled = outcome is not None and (outcome.status != "failed" or note.startswith("failed"))
        if settled:
            self.finished += 1
            self.done += task.predicted_seconds
        if note:
            self.failed += note.startswith("failed")
            self.notes += 1
            if self.notes <= MAX_NOTES:
                self.console.warn(f"{task.name}: {note}")
            elif self.notes == MAX_NOTES + 1:
                self.console.warn("further failures are in the failures table only")
        if self.bar is not None:
            failed = f", {self.failed} failed" if self.failed else ""
            self.bar.update(
                self.bar.task_ids[0], completed=self.done, total=self.total,
                description="training" if task.spec.kind == "train" else "measuring",
                units=f"{self.finished}/{self.units} units{failed}",
            )  # fmt: skip
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            self.console.say(
                f"{self.finished}/{self.units} units, {self.failed} failed, "
                f"{self.done / max(self.total, 1e-9):.0%} of the predicted work"
            )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
