"""``flatcensus lock`` and ``flatcensus fetch``: what the hub has, pinned and brought here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command import JsonOption, ManifestArg, RunOption, shown
from pipeline.console import LINE_SECONDS, Console, table_of
from pipeline.durations import size
from pipeline.errors import EXIT_ENVIRONMENT, EXIT_FAILED_UNITS, EXIT_OK

if TYPE_CHECKING:
    from pipeline.fetch import Wanted


def lock(
    manifest: ManifestArg,
    update: Annotated[
        bool, typer.Option("--update", help="Take the hub's current commits; print which moved.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Pin what a manifest names on the hub: commits, sizes and SHA-256, in a file beside it."""
    from pipeline.locking import lock_manifest
    from pipeline.manifest import load_manifest

    console = Console(as_json=as_json)
    lines, path = lock_manifest(load_manifest(manifest), manifest, update=update)
    if not lines:
        console.say(f"{manifest} names nothing on the hub; there is nothing to lock")
        return EXIT_OK
    columns = ["name", "repository", "commit", "bytes", "sha256", "state", "reason"]
    records = [line.record() for line in lines]
    if not as_json:
        columns = ["name", "repository", "commit", "state"]
        records = [{**record, "commit": str(record["commit"])[:12]} for record in records]
    console.table(table_of(records, columns))
    if not as_json:  # sentences would make a narrow column of a terminal's table
        for line in lines:
            if line.reason:
                console.warn(f"{line.name}: {line.reason}")
    failed = sum(line.state == "failed" for line in lines)
    console.say(f"{len(lines) - failed} of {len(lines)} locked in {path}")
    console.next_step(f"flatcensus fetch {shown(manifest)} --dry-run", "what is to be downloaded")
    return EXIT_FAILED_UNITS if failed else EXIT_OK


def fetch(
    manifest: ManifestArg,
    run_folder: RunOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Download nothing; show sizes.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Download what a manifest needs from the hub, ahead of a launch. Again: continue."""
    from pipeline.fetch import fetch as download_all
    from pipeline.fetch import survey
    from pipeline.lock import known_lock
    from pipeline.run import start_run

    console = Console(as_json=as_json)
    run = start_run(manifest, run_folder)
    wanted = survey(run.manifest, known_lock(run.manifest.lock_path, run.store))
    full = None
    if not dry_run:
        progress = _Progress(console, wanted)
        try:
            wanted, full = download_all(wanted, progress.ended)
        finally:
            progress.close()
    console.table(table_of([_record(item, as_json) for item in wanted], _FETCH_COLUMNS))
    if not as_json:
        for item in wanted:
            if item.state == "failed":
                console.warn(f"{item.name}: {item.reason}")
    _say_totals(console, wanted)
    place = f" --run {shown(run_folder)}" if run_folder else ""
    if full is not None:
        console.error(str(full))
        console.next_step(f"flatcensus fetch {shown(manifest)}{place}", "when there is space")
        return EXIT_ENVIRONMENT
    failed = any(item.state == "failed" for item in wanted)
    if dry_run or failed:
        console.next_step(f"flatcensus fetch {shown(manifest)}{place}", "download it")
    else:
        console.next_step(f"flatcensus launch {shown(manifest)}{place}", "measure")
    return EXIT_FAILED_UNITS if failed else EXIT_OK


_FETCH_COLUMNS = ["checkpoint", "repository", "bytes", "state"]


def _record(item: Wanted, as_json: bool) -> dict[str, object]:
    num_bytes: object = item.num_bytes
    if not as_json:
        num_bytes = "unknown" if item.num_bytes is None else size(item.num_bytes)
        num_bytes = f"about {num_bytes}" if item.is_estimate else num_bytes
    state = f"failed: {item.reason}" if as_json and item.state == "failed" else item.state
    return {"checkpoint": item.name, "repository": item.repository, "bytes": num_bytes,
            "state": state}  # fmt: skip


def _say_totals(console: Console, wanted: Sequence[Wanted]) -> None:
    from huggingface_hub import constants

    from pipeline.hub_cache import free_bytes

    parts = []
    for state in ("cached", "fetched", "to fetch", "failed"):
        items = [item for item in wanted if item.state == state]
        if items:
            about = "about " if any(item.is_estimate for item in items) else ""
            total = sum(item.num_bytes or 0 for item in items)
            parts.append(f"{len(items)} {state} ({about}{size(total)})")
    console.say(", ".join(parts) or "nothing is needed from the hub")
    missing = sum(i.num_bytes or 0 for i in wanted if i.state in ("to fetch", "failed"))
    free = free_bytes()
    console.say(f"cache: {constants.HF_HUB_CACHE}, {size(free)} free")
    if missing > free:
        console.warn(
            f"{size(missing)} are missing, more than is free: set HF_HOME to a folder on a larger "
            "disk, or free some space"
        )


class _Progress:
    """One bar on a terminal, one line a minute elsewhere; sizes are what is downloaded."""

    def __init__(self, console: Console, wanted: Sequence[Wanted]) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.console, self.last_line = console, time.monotonic()
        self.todo = [item for item in wanted if item.state == "to fetch"]
        self.total = sum(item.num_bytes or 0 for item in self.todo)
        self.num_done = self.done = 0
        self.bar = None
        if self.todo and console.err.is_terminal and not console.as_json:
            self.bar = Progress(
                TextColumn("fetching"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                console=console.err, transient=True,
            )  # fmt: skip
            self.bar.add_task("", total=self.total)
            self.bar.start()

    def ended(self, item: Wanted) -> None:
        """One of them is there, or has failed."""
        if item.state == "cached":
            return
        self.num_done += 1
        self.done += item.num_bytes or 0
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            self.console.say(
                f"{self.num_done}/{len(self.todo)} fetched, {size(self.done)} of {size(self.total)}"
            )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
