"""A run: a store, the manifest it belongs to, and the steps every command is made of.

``open_run`` finds a run by its folder, ``start_run`` begins or continues one from a manifest. The
folder holds a copy of the manifest and the place its relative paths start from, so every later
command needs the folder alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.compact import pack_if_many
from pipeline.decisions import DECISIONS
from pipeline.driver import launch
from pipeline.entries import Manifest
from pipeline.errors import UsageError
from pipeline.executor import Executor, InlineExecutor
from pipeline.frozen import FROZEN, thaw
from pipeline.lock import LOCK, keep
from pipeline.manifest import load_manifest, parse_manifest
from pipeline.memo import fingerprint
from pipeline.plan import Plan, make_plan
from pipeline.reduce import Tables, planned_units, reduce_run, write_tables
from pipeline.resolve import resolve
from pipeline.scheduler import Launch, Observer
from pipeline.shards import Quarantined
from pipeline.specs import Resolved
from pipeline.standing import MANIFEST
from pipeline.store import Store, open_store

RUN = "run.json"
RUN_VERSION = 1
# What a launch writes; anything else in a folder means that it is somebody else's.
CONTENTS = frozenset((
    MANIFEST, RUN, FROZEN, DECISIONS, LOCK, "specs", "shards", "checkpoints", "tables", "figures",
    "report.html", "quarantine", "launches", "packs", "probe",
))  # fmt: skip
TEMPORARY_SECONDS = 3600.0  # older temporaries belong to dead writers: chosen


@dataclass(frozen=True)
class Run:
    """A manifest and the store of its results."""

    manifest: Manifest
    store: Store

    def plan(self) -> Plan:
        """What is done and what is to do, with checkpoints and images as they are now."""
        resolved = resolve(self.manifest, self.store, tentative=True)
        return make_plan(self.manifest, self.store, resolved=resolved)

    def recall(self) -> Plan:
        """The same from the run folder alone, with checkpoints and images as last launched."""
        resolved = thaw(self.manifest, self.store)
        return make_plan(self.manifest, self.store, resolved=resolved)

    def reduce(self, *, publish: bool = True) -> tuple[Plan, Tables]:
        """Build the tables from the units as they are now, and publish them in the run folder.

        Many loose shards are packed before that.
        """
        if publish:
            pack_if_many(self.store)
        damaged: list[Quarantined] = []
        while True:
            # First, so that what is committed meanwhile makes the tables out of date.
            made_from = fingerprint(self.store)
            resolved = thaw(self.manifest, self.store)
            plan = make_plan(self.manifest, self.store, resolved=resolved)
            units = planned_units(plan, self.store, quarantined=damaged)
            if not damaged:
                break
            damaged.clear()  # what was set aside is to do again: the plan is another one now
        tables = reduce_run(self.manifest, plan, units)
        if resolved is not None:  # else they rest on more than the folder
            tables = replace(tables, made_from=made_from)
        if publish:
            write_tables(tables, self.store)
        return plan, tables


def start_run(manifest_path: Path, folder: str | None) -> Run:
    """Begin or continue the run of a manifest. Raises ManifestError, StoreError or UsageError."""
    manifest = load_manifest(manifest_path)
    run = Run(manifest, open_store(folder or f"runs/{manifest.name}"))
    if run.store.exists(RUN):
        known = _read_description(run.store).name
        if known != manifest.name:
            raise UsageError(
                f"{run.store.uri} is the run of manifest {known!r}, not of {manifest.name!r}. "
                "Give the new manifest a folder of its own with --run"
            )
    elif foreign := [key for key in run.store.list() if key.partition("/")[0] not in CONTENTS]:
        raise UsageError(
            f"{run.store.uri} is not empty and no run folder: it holds {foreign[0]!r}. "
            "Choose a new or empty folder with --run"
        )
    return run


def open_run(folder: str) -> Run:
    """Open an existing run folder. Raises UsageError if it is none."""
    store = open_store(folder)
    if not (store.exists(RUN) and store.exists(MANIFEST)):
        raise UsageError(
            f"{folder} is not a run folder: expected {RUN} and {MANIFEST} in it. "
            "Runs are made by: flatcensus launch MANIFEST"
        )
    known, where = _read_description(store), f"{store.uri}/{MANIFEST}"
    try:
        text = store.get(MANIFEST).decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is damaged ({error}). Launch the manifest again with --run {store.uri}"
        ) from error
    return Run(parse_manifest(text, where=where, root=known.root, folders=known.folders), store)


def execute(
    run: Run,
    observer: Observer,
    *,
    on: str,
    retry_failed: bool = False,
    train_only: bool = False,
    launch_id: str | None = None,
) -> Launch:
    """Prepare the run folder, then run what is to do."""
    found = prepare(run)
    return launch(
        run.manifest,
        run.store,
        executor_opener(run, on),
        observer,
        retry_failed=retry_failed,
        train_only=train_only,
        resolved=found,
        launch_id=launch_id,
        on=on,
    )


def prepare(run: Run) -> Resolved:
    """Probe the store and write all that a launch needs into it; the manifest's specs."""
    found = resolve(run.manifest, run.store)  # a manifest that cannot be run leaves no trace
    run.store.probe()
    run.store.put(MANIFEST, run.manifest.text.encode())
    run.store.put(RUN, _description(run.manifest))
    keep(found.files, run.store)
    run.store.clean_temporaries(TEMPORARY_SECONDS)
    return found


def executor_opener(run: Run, on: str) -> Callable[[], Executor]:
    """How to open the executor named by ``--on``: ``inline``, ``local`` or a cluster's address."""
    resources = run.manifest.resources
    if on == "inline":
        return lambda: InlineExecutor(resources)
    if on.startswith(("http://", "https://")):
        raise UsageError(
            f"{on} is a dashboard, for jobs: add --detach. Without it this machine must belong to "
            "the cluster: --on with the address of its head, as head:6379"
        )
    from pipeline.nodes import require_reach
    from pipeline.ray_executor import RayExecutor

    if on == "local":
        return lambda: RayExecutor(resources)
    check = partial(require_reach, run.store, run.manifest)
    return lambda: RayExecutor(resources, address=on, check=check)


class _Description(NamedTuple):
    """What ``run.json`` keeps: whose run it is, and where its paths start and led to."""

    name: str
    root: Path
    folders: tuple[Path, ...]


def _description(manifest: Manifest) -> bytes:
    folders = [str(path) for _, paths in manifest.local for path in paths]
    known = {"run_version": RUN_VERSION, "name": manifest.name, "root": str(manifest.root),
             "checkpoint_folders": folders}  # fmt: skip
    return json.dumps(known, indent=1).encode()


def _read_description(store: Store) -> _Description:
    try:
        found = json.loads(store.get(RUN))
        version = found["run_version"]
        folders = tuple(Path(str(path)) for path in found.get("checkpoint_folders", ()))
        known = _Description(str(found["name"]), Path(str(found["root"])), folders)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{store.uri}/{RUN} is damaged ({error!r}). Launch the manifest again with "
            f"--run {store.uri}"
        ) from error
    if version != RUN_VERSION:
        raise UsageError(
            f"{store.uri} was written by another flatcensus (run version {version}, this one reads "
            f"{RUN_VERSION}). Use that version, or a new run folder"
        )
    return known
