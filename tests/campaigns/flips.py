"""Single-bit flips in what a run folder keeps: none may pass ``verify`` or change an answer."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
from populations import save_mlp, write_manifest

from pipeline.compact import compact
from pipeline.memo import MEMO, recall, run_tables
from pipeline.run import execute, start_run
from pipeline.shards import verify
from pipeline.store import Store, open_store

MEASUREMENTS = """
[[measurements]]
metric = "accuracy"
[[measurements]]
metric = "normalized_mls"
"""
ASK_EVERY = 25  # flips, between two that are followed by a query from the results: chosen


class Silent:
    """An observer that says nothing."""

    def planned(self, plan: object, num_slots: int) -> None:
        """Nothing."""

    def ended(self, task: object, outcome: object, note: str) -> None:
        """Nothing."""


def flip(folder: Path, number: int, *, seed: int) -> dict[str, Counter[str]]:
    """Turn bits over, one at a time, and see who notices.

    Args:
        folder: For the runs; created.
        number: Of flips, spread over shards, packs and tables.
        seed: Decides which.

    Returns:
        For ``shard``, ``pack`` and ``table``: how many flips were ``noticed``, how many were
        ``harmless`` (the answer is the same to the bit) and how many ``silent``, which is a bug.
    """
    loose, packed = _runs(folder)
    rng, found = random.Random(seed), {what: Counter[str]() for what in ("shard", "pack", "table")}
    places = {
        "shard": [p for p in _files(loose) if "shards" in p.parts],
        "pack": [p for p in _files(packed) if "packs" in p.parts],
        "table": [p for p in _files(loose) if "tables" in p.parts],
    }
    truth = {run: _answer(open_store(run)) for run in (loose, packed)}
    for index in range(number):
        what = rng.choice(["shard", "shard", "pack", "table"])
        path = rng.choice(places[what])
        run = packed if what == "pack" else loose
        verdict = ""
        for _ in _flipped(path, rng.randrange(8 * path.stat().st_size), run):
            if what == "table":
                verdict = _of_tables(run, truth[run])
            else:
                verdict = _of_results(run, truth[run], asked=index % ASK_EVERY == 0)
        found[what][verdict] += 1
    return found


def _of_results(run: Path, truth: dict[str, pa.Table], *, asked: bool) -> str:
    """What a query made from these results says, and then ``verify``."""
    if asked:
        (run / MEMO).unlink()
        told = _read(run_tables(str(run))["summary"])
        complete = all(status == "ok" for status in told.column("status").to_pylist())
        if complete and told != truth["summary"]:
            return "silent"
    aside = run / "quarantine"
    return "noticed" if verify(open_store(run)) or aside.exists() else "silent"


def _of_tables(run: Path, truth: dict[str, pa.Table]) -> str:
    told = _answer(open_store(run))
    if not told:
        return "noticed"
    return "harmless" if told == truth else "silent"


def _answer(store: Store) -> dict[str, pa.Table]:
    """The tables as a query would use them without looking at results; empty if it would not."""
    return {name: _read(table) for name, table in (recall(store) or {}).items()}


def _read(table: pa.Table | ds.Dataset) -> pa.Table:
    return table if isinstance(table, pa.Table) else table.to_table()


def _flipped(path: Path, bit: int, run: Path) -> Iterator[None]:
    """The run with one bit of one file turned over; as it was, after that."""
    times = path.stat()
    kept = {p: (p.read_bytes(), p.stat()) for p in _files(run)}
    data = bytearray(kept[path][0])
    data[bit // 8] ^= 1 << bit % 8
    _write(path, bytes(data), times)
    yield
    for other in _files(run):
        if other not in kept:
            other.unlink()
    shutil.rmtree(run / "quarantine", ignore_errors=True)
    for other, (content, stat) in kept.items():
        if not other.exists() or other.read_bytes() != content:
            _write(other, content, stat)


def _write(path: Path, data: bytes, times: os.stat_result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate(len(data))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _runs(folder: Path) -> tuple[Path, Path]:
    """A small finished run with loose shards, and one whose shards are packed."""
    for seed in range(2):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    manifest = write_manifest(folder / "flips.toml", samples=8, measurements=MEASUREMENTS)
    runs = folder / "loose", folder / "packed"
    for run in runs:
        result = execute(start_run(manifest, str(run)), Silent(), on="inline")
        assert (result.failed, result.interrupted) == (0, False)
    compact(open_store(runs[1]))
    for run in runs:
        shutil.rmtree(run / "launches")
        run_tables(str(run))
    return runs


def _files(run: Path) -> list[Path]:
    return sorted(p for p in run.rglob("*") if p.is_file())
