"""``--detach``, ``logs``, ``stop``: launches that run elsewhere, and what ``status`` says of them.

All of it rests on the run folder, ``launches/``. The cluster is asked for what only it has, a log
that is fresher by seconds and the end of a process that does not listen; it may be gone.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.command import JsonOption, RunArg, relative, shown
from pipeline.console import Console
from pipeline.durations import duration
from pipeline.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ResourceError,
    UsageError,
)
from pipeline.launches import (
    FOLDER,
    LaunchRecord,
    new_launch_id,
    read_launch,
    read_launches,
    request_stop,
    write_launch,
)
from pipeline.store import MissingKeyError

if TYPE_CHECKING:
    from pipeline.ray_jobs import Jobs
    from pipeline.run import Run
    from pipeline.store import Store

FOLLOW_SECONDS = 2.0  # between two looks at a log that is followed, or at a launch that stops
GRACE_SECONDS = 20.0  # for a launch to answer `stop --now`, before Ray ends its process: chosen
SUBMIT_SECONDS = 600.0  # a submitted launch that has not begun by then never will: chosen

LaunchOption = Annotated[
    str | None, typer.Option("--launch", help="Which launch; the newest if left out.")
]


def launch_detached(console: Console, run: Run, *, on: str, retry_failed: bool = False) -> int:
    """Submit a launch as a job of the cluster, and see it begin."""
    from pipeline.ray_jobs import await_start, connect, submit
    from pipeline.run import prepare

    folder = shown(relative(run.store.uri))
    jobs = connect(on)
    for record in read_launches(run.store):
        begins = record.state in ("submitted", "running")  # an ended one may still write reports
        if record.job is not None and begins and _lives(record, jobs):
            raise UsageError(
                f"launch {record.id} of this run {_state(record)} on {record.job['dashboard']}. "
                f"Follow it with: flatcensus logs {folder} --follow, or end it with: flatcensus "
                f"stop {folder}"
            )
    prepare(run)
    record = _submitted(on, jobs)
    launch_id = record.id
    write_launch(run.store, record)
    try:
        submit(jobs, run.store, launch_id, *["--retry-failed"] * retry_failed)
        console.say(f"submitted to {jobs.dashboard} as {launch_id}; waiting for its slots")
        begun = await_start(jobs, run.store, launch_id)
    except ResourceError as error:
        latest = read_launch(run.store, launch_id) or record
        if latest.state == "submitted":
            changes = {"state": "failed", "message": str(error)}
            write_launch(run.store, latest.model_copy(update=changes))
        raise
    except KeyboardInterrupt:
        console.warn(f"launch {launch_id} goes on without this command")
        begun = None
    if begun is None or (not begun.num_slots and begun.state == "running"):
        console.say("it has begun, and has no slots yet")
    elif begun.state == "running":
        console.say(f"running on {begun.num_slots} slots; this machine is not needed any more")
    else:
        console.say(f"{begun.state}: {begun.committed} units committed, {begun.failed} failed")
    console.data({"launch": launch_id, "dashboard": jobs.dashboard})
    console.next_step(f"flatcensus status {folder}", f"or: flatcensus logs {folder} --follow")
    return EXIT_OK


def logs(
    run: RunArg,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the launch ends.")
    ] = False,
    launch: LaunchOption = None,
) -> int:
    """Print what a detached launch has printed: from its cluster, or from the run folder."""
    from pipeline.run import open_run

    console, store = Console(), open_run(run).store
    record = _chosen(store, run, launch)
    jobs = _reached(record)
    if record.job is not None and jobs is None:
        gone = f"{record.job['dashboard']} does not answer, or does not know it any more"
        console.warn(f"{gone}: the log as it was copied last")
    printed = 0
    while True:
        latest = read_launch(store, record.id) or record
        over = not follow or not _lives(latest, jobs)  # before reading, or the last lines are lost
        text = _log(store, record, jobs)
        if text is None and over:
            raise UsageError(
                f"launch {record.id} has left no log. It was started on {record.host} "
                + ("and wrote to its terminal" if record.job is None else "and never got so far")
                + f". See: flatcensus status {shown(run)}"
            )
        if text is not None:
            sys.stdout.write(text[printed:])
            sys.stdout.flush()
            printed = max(printed, len(text))
        if over:
            return EXIT_OK
        time.sleep(FOLLOW_SECONDS)


def stop(
    run: RunArg,
    now: Annotated[bool, typer.Option("--now", help="Do not let running units finish.")] = False,
    as_json: JsonOption = False,
) -> int:
    """End the launches of a run, wherever they are; nothing that is done is lost."""
    from pipeline.run import open_run

    console, store = Console(as_json=as_json), open_run(run).store
    running = [record for record in read_launches(store) if is_running(record)]
    if not running:
        console.say(f"nothing runs in {run}")
        console.next_step(f"flatcensus status {shown(run)}", "what is done and what is not")
        return EXIT_OK
    code = EXIT_OK
    for record in running:
        request_stop(store, record.id, "now" if now else "drain")
        console.say(
            f"launch {record.id} on {_place(record)} is asked to stop"
            + ("" if now else " when its running units are finished; --now does not wait for them")
        )
    for record in running:
        try:
            ended = _await_end(console, store, record, now=now)
        except KeyboardInterrupt:
            console.warn("not waiting any longer; the request stands")
            return EXIT_INTERRUPTED
        console.data({"launch": record.id, "state": ended.state, "committed": ended.committed})
        if ended.state in ("running", "submitted"):
            console.warn(f"launch {record.id} {_silence(ended)}: it may be gone already")
            code = EXIT_ENVIRONMENT
        else:
            console.say(f"launch {record.id}: {ended.state}, {ended.committed} units committed")
    console.next_step(resume_command(run, running[-1]), "continue")
    return code


def launch_lines(records: list[LaunchRecord]) -> list[str]:
    """A sentence on each launch that runs, and on the newest, for ``status``."""
    told = [record for record in records[:-1] if is_running(record)] + records[-1:]
    return [_sentence(record) for record in told]


def resume_command(run: str, record: LaunchRecord | None) -> str:
    """How to continue a run where its last launch was."""
    on = "local" if record is None else _place(record)
    place = "" if on in ("local", "inline") else f" --on {shown(on)}"
    detach = " --detach" if record is not None and record.job is not None else ""
    return f"flatcensus resume {shown(run)}{place}{detach}"


def is_running(record: LaunchRecord) -> bool:
    """Whether it says so itself, or was submitted so lately that it may still begin."""
    waits = record.state == "submitted" and record.silent_seconds < SUBMIT_SECONDS
    return record.is_alive or waits


def _submitted(on: str, jobs: Jobs) -> LaunchRecord:
    """The record of a launch that only its cluster can begin."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return LaunchRecord(
        id=new_launch_id(), on=on, host=socket.gethostname(), pid=os.getpid(), started_at=now,
        heartbeat_at=now, state="submitted", job={"dashboard": jobs.dashboard},
    )  # fmt: skip


def _sentence(record: LaunchRecord) -> str:
    where = f"launch {record.id} on {_place(record)}"
    counts = f"{record.committed} units committed"
    if record.is_alive:
        return (
            f"{where} {_state(record)} with {record.num_slots} slots: {counts}, "
            f"{record.remaining} to do, last sign of life {duration(record.silent_seconds)} ago"
        )
    if record.state == "running":
        return f"{where} {_silence(record)}: it was killed, or its machine or cluster is gone"
    if record.state == "submitted":
        age = duration(record.silent_seconds)
        late = "" if is_running(record) else ": it will not start any more"
        return f"{where} was submitted {age} ago and has not begun{late}"
    reason = f" ({record.message.splitlines()[0]})" if record.message else ""
    return f"{where} {_state(record)}{reason}: {counts}, {record.failed} failed"


def _place(record: LaunchRecord) -> str:
    """Where it is, as ``--on`` takes it."""
    return record.on if record.job is None else record.job["dashboard"]


def _state(record: LaunchRecord) -> str:
    return {
        "submitted": "waits to begin", "running": "runs", "done": "is done",
        "interrupted": "was stopped", "failed": "has failed",
    }[record.state]  # fmt: skip


def _silence(record: LaunchRecord) -> str:
    return f"has given no sign of life for {duration(record.silent_seconds)}"


def _lives(record: LaunchRecord, jobs: Jobs | None) -> bool:
    """Whether it is running, which its cluster knows best: after "done" comes the report."""
    from pipeline.ray_jobs import job_state

    if jobs is not None and record.job == {"dashboard": jobs.dashboard}:
        state = job_state(jobs, record.id)
        if state is not None:
            return not state.has_ended
    return is_running(record)


def _chosen(store: Store, run: str, launch: str | None) -> LaunchRecord:
    records = read_launches(store)
    if launch is not None:
        chosen = [record for record in records if record.id == launch]
        if not chosen:
            known = ", ".join(record.id for record in records[-10:]) or "none"
            raise UsageError(f"{run} has no launch {launch!r}. Launches: {known}")
        return chosen[0]
    if not records:
        raise UsageError(f"nothing was launched in {run} yet")
    return next((r for r in reversed(records) if r.job is not None), records[-1])


def _reached(record: LaunchRecord) -> Jobs | None:
    """The cluster of a launch, if it answers and still knows it."""
    from pipeline.ray_jobs import UNKNOWN, connect, job_state

    if record.job is None:
        return None
    try:
        jobs = connect(record.job["dashboard"])
    except ResourceError:
        return None
    state = job_state(jobs, record.id)
    return jobs if state is not None and state.status != UNKNOWN else None


def _log(store: Store, record: LaunchRecord, jobs: Jobs | None) -> str | None:
    from pipeline.ray_jobs import job_log

    text = None if jobs is None else job_log(jobs, record.id)
    if text is not None:
        return text
    try:
        return store.get(f"{FOLDER}/{record.id}.log").decode(errors="replace")
    except MissingKeyError:
        return None


def _await_end(console: Console, store: Store, record: LaunchRecord, *, now: bool) -> LaunchRecord:
    """Wait until a launch that was asked to stop has, or has gone silent; its last record."""
    from pipeline.ray_jobs import stop_job

    began = said = time.monotonic()
    asked_ray = False
    while True:
        latest = read_launch(store, record.id) or record
        if latest.state not in ("running", "submitted") or not is_running(latest):
            return latest
        waited = time.monotonic() - began
        if now and waited > GRACE_SECONDS and not asked_ray:
            asked_ray = True
            jobs = _reached(latest)
            if jobs is not None and stop_job(jobs, record.id):
                console.say(f"launch {record.id} does not listen; Ray was asked to end it")
        if time.monotonic() - said > 30:
            said = time.monotonic()
            console.say(f"waiting for launch {record.id} since {duration(waited)}")
        time.sleep(FOLLOW_SECONDS)
