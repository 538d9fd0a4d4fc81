"""All benchmarks in one run, so that ratios compare like with like: ``make bench``.

    python -m tests.benchmarks [--run RUN] [--dataset NAME] [--only NAME ...] [--markdown]

Measures three checkpoints of a run folder (first, middle, last by name), or three small networks
trained on the spot where there is no such run. One thread throughout. ``scale`` is only done by
name. Writes ``runs/bench.json``; with ``--markdown`` the goals are a Markdown table on stdout. Says
which goals are met and fails on none of them: times are a matter of the machine.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline.run import open_run
from pipeline.versions import versions

from . import (
    bench_adaptive_sharpness,
    bench_cost,
    bench_engine,
    bench_jacobian,
    bench_layers,
    bench_mls,
    bench_precision,
    bench_scale,
    goals,
    networks,
)

USUAL = ("mls", "jacobian", "layers", "adaptive_sharpness", "engine", "cost", "precision")
NAMES = (*USUAL, "scale")  # which takes most of an hour


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/fashion-vits"))
    parser.add_argument("--dataset", help="of the checkpoints; else the run's, else the largest")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=USUAL)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=arguments.markdown, width=150, markup=False)

    started, load = time.monotonic(), os.getloadavg()[0]
    with _checkpoints(arguments.run, arguments.dataset, console) as (paths, dataset):
        tables, found = _measure(arguments.only, paths, dataset, console)
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": _machine(load),
            "versions": {"python": platform.python_version(), **versions()},
            "dataset": dataset,
            "checkpoints": [networks.name_of(path) for path in paths],
            "seconds": time.monotonic() - started,
            "goals": [{**asdict(g), "met": g.met} for g in found],
            **tables,
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown:
        print(_markdown(report, found))
    else:
        console.print(_goal_table(found))
        console.print(_circumstances(report))
    met = sum(goal.met for goal in found)
    console.print(f"{met} of {len(found)} goals met; rows in {arguments.output}")


def _measure(
    only: list[str], paths: list[Path], dataset: str, console: Console
) -> tuple[dict[str, list[dict[str, Any]]], list[goals.Goal]]:
    """Rows by benchmark, printed as they come, and the goals they speak to."""
    tables: dict[str, list[dict[str, Any]]] = {}
    found: list[goals.Goal] = []
    for name, run, table, judge in (
        ("mls", lambda: bench_mls.run(paths, dataset), bench_mls.table, goals.sensitivity_goals),
        ("jacobian", bench_jacobian.run, bench_jacobian.table, goals.jacobian_goals),
        ("layers", bench_layers.run, bench_layers.table, goals.layer_goals),
        (
            "adaptive_sharpness",
            lambda: bench_adaptive_sharpness.run(paths, dataset),
            bench_adaptive_sharpness.table,
            goals.sharpness_goals,
        ),
        ("engine", bench_engine.run, bench_engine.table, goals.engine_goals),
        ("scale", bench_scale.run, bench_scale.table, goals.scale_goals),
        ("cost", bench_cost.run, bench_cost.table, goals.cost_goals),
        (
            "precision",
            lambda: bench_precision.run(Path("runs")),
            bench_precision.table,
            goals.precision_goals,
        ),
    ):
        if name in only:
            tables[name] = run()
            console.print(table(tables[name]))
            found += judge(tables[name])
    return tables, found


@contextmanager
def _checkpoints(
    run: Path, dataset: str | None, console: Console
) -> Iterator[tuple[list[Path], str]]:
    """Folders of the checkpoints to measure, and the data set they belong to."""
    if paths := networks.checkpoints_of(run):
        yield paths, dataset or open_run(str(run)).manifest.data.name
        return
    dataset = dataset or networks.default_dataset()
    console.print(f"{run} holds no checkpoints: training three small networks on {dataset}")
    with tempfile.TemporaryDirectory(prefix="flatcensus-bench-") as folder:
        yield networks.trained_checkpoints(Path(folder), dataset), dataset


def _machine(load: float) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text().splitlines()
        processor = next(
            (x.split(": ", 1)[1] for x in lines if x.startswith("model name")), processor
        )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load_at_start": load,
    }


def _goal_table(found: list[goals.Goal]) -> Table:
    shown = Table("subject", "what", "goal", "measured", "met", "error", title="Goals")
    for goal in found:
        met = "yes" if goal.met else "no"
        bound = f"{goal.kind} {goal.bound:g}{goal.unit}"
        shown.add_row(goal.subject, goal.what, bound, goal.shown, met, goal.error)
    return shown


def _markdown(report: dict[str, Any], found: list[goals.Goal]) -> str:
    lines = ["| what | goal | measured | met | error |", "| --- | --- | --- | --- | --- |"]
    for goal in found:
        kind = {">=": "≥", "<=": "≤"}[goal.kind]
        lines.append(
            f"| {goal.subject}: {goal.what} | {kind} {goal.bound:g}{goal.unit} | {goal.shown} "
            f"| {'yes' if goal.met else 'no'} | {goal.error} |"
        )
    if "precision" in report:
        lines += ["", bench_precision.markdown(report["precision"])]
    return "\n".join([*lines, "", _circumstances(report)])


def _circumstances(report: dict[str, Any]) -> str:
    machine, known = report["machine"], report["versions"]
    return (
        f"{report['date']}, {machine['processor']}, {machine['cores']} cores, one thread, load "
        f"{machine['load_at_start']:.1f} at the start; "
        + ", ".join(f"{name} {version}" for name, version in known.items())
        + f"; {', '.join(report['checkpoints'])} on {report['dataset']}; "
        f"{report['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
