"""One process of the scale benchmark: a command, or a launch that says when it got where.

    python -m tests.benchmarks.scale_process command status RUN
    python -m tests.benchmarks.scale_process launch MANIFEST RUN EXECUTOR

The measurement of ``many_units`` is known in it, as in no other command, but only where it must be:
what commands import is part of their time. A launch prints the time of every step as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Do what the arguments say."""
    mode, *arguments = sys.argv[1:]
    if mode == "command":
        from pipeline.cli import app

        command, folder, *_ = arguments
        if command == "query" and not (Path(folder) / "tables/memo.json").exists():
            from many_units import register

            register()  # the query reduces

        sys.argv[1:] = arguments
        app()
    _launch(*arguments)


def _launch(manifest: str, folder: str, executor: str) -> None:
    from many_units import register

    from pipeline.driver import launch
    from pipeline.run import executor_opener, prepare, start_run

    _mark("imports")
    register()
    run = start_run(Path(manifest), folder)
    resolved = prepare(run)
    _mark("resolving")
    opener = executor_opener(run, executor)

    def open_executor() -> Any:
        _mark("planning")
        found = opener()
        _mark("slots")
        return found

    launch(run.manifest, run.store, open_executor, _First(), resolved=resolved, on=executor)
    _mark("all units")


class _First:
    """Says when the first unit is done."""

    def __init__(self) -> None:
        self.said = False

    def planned(self, plan: object, num_slots: int) -> None:
        """Nothing."""

    def ended(self, task: object, outcome: object, note: str) -> None:
        """The first is told."""
        if not self.said:
            self.said = True
            _mark("first unit")


def _mark(step: str) -> None:
    print(json.dumps({"step": step, "time": time.time()}), flush=True)


if __name__ == "__main__":
    main()
