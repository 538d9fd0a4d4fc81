"""``flatcensus doctor --on ADDRESS``: what the nodes of a cluster have, and what they lack.

Only a machine of the cluster can ask its nodes, so a job does it. That shows too that jobs work and
that the code gets there.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.doctor import Finding
from pipeline.errors import ResourceError
from pipeline.nodes import HEALTH_FLAGS, MARK, Report, question
from pipeline.ray_jobs import (
    Jobs,
    connect,
    job_log,
    job_state,
    log_end,
    stop_job,
    submit_command,
)
from pipeline.run import open_run
from pipeline.versions import versions

JOB_SECONDS = 120.0  # for a job to ask all nodes: chosen
SKEW_SECONDS = 5.0  # of a clock that ages of launches are still right with: chosen


def examine_cluster(address: str, run: str | None) -> Iterator[Finding]:
    """Check a cluster's job server and every node; with a run, whether the nodes reach it."""
    yield _token()
    try:
        jobs = connect(address)
    except ResourceError as error:
        yield Finding("jobs", "fail", str(error))
        return
    try:
        if run is None:
            reports = _surveyed(jobs)
        else:
            opened = open_run(run)
            with question(opened.store, opened.manifest) as key:
                reports = _surveyed(jobs, opened.store.uri, key)
    except ResourceError as error:
        yield Finding("jobs", "fail", str(error))
        return
    yield Finding("jobs", "ok", f"job server at {jobs.dashboard}")
    for report in reports:
        yield _node(report, run is not None)
    yield from _versions(reports)
    yield from _losses(reports)
    yield from _clocks(reports)


def _token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    place = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    found = bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(place).expanduser().is_file()
    if mode.lower() == "token" and not found:
        why = f"RAY_AUTH_MODE=token, but there is no token: neither RAY_AUTH_TOKEN nor {place}"
        return Finding("token", "fail", why)
    detail = f"RAY_AUTH_MODE={mode or '(unset)'}, token {'found' if found else 'not found'}"
    if not mode:
        # `ray start --head` turns it on by itself, `ray start --address` does not.
        detail += "; set it alike on all nodes and here: token or disabled"
        return Finding("token", "warn", detail)
    return Finding("token", "ok", detail)


def _surveyed(jobs: Jobs, *asked: str) -> list[Report]:
    """The nodes' reports, by a job. Raises ResourceError if it gives none."""
    job_id = f"doctor-{secrets.token_hex(4)}"
    submit_command(jobs, ["python", "-m", "pipeline.nodes", *asked], job_id)
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        state = job_state(jobs, job_id)
        if state is not None and state.has_ended:
            log = job_log(jobs, job_id) or ""
            told = [line for line in log.splitlines() if line.startswith(MARK)]
            if told:
                records = json.loads(told[-1].removeprefix(MARK))
                return [Report(**record) for record in records]
            raise ResourceError(f"a job that asks the nodes has failed: {log_end(log)}")
        time.sleep(0.5)
    stop_job(jobs, job_id)
    raise ResourceError(
        f"a job that asks the nodes gave no answer within {JOB_SECONDS:g} s. See `ray status` and "
        f"the dashboard at {jobs.dashboard}"
    )


def _node(report: Report, with_run: bool) -> Finding:
    name = f"node {report.host}"
    has = f"{report.cpus:g} CPUs, {report.gpus:g} GPUs"
    if report.silent:
        return Finding(name, "fail", f"{has}; Ray counts it as alive, but it does not answer")
    if report.problems:
        return Finding(name, "fail", f"{has}; {'; '.join(report.problems)}")
    reach = "; reads and writes the run folder" if with_run else ""
    return Finding(name, "ok", f"{has}{reach}")


def _versions(reports: list[Report]) -> Iterator[Finding]:
    """What the nodes compute with: alike among them, or slots are refused; and compared to here."""
    told = [report for report in reports if report.versions]
    if not told:
        return
    here = {"python": platform.python_version(), **versions()}
    # Of most nodes; of equally many, the first's.
    common = max((report.versions for report in told), key=[r.versions for r in told].count)
    odd = [report for report in told if report.versions != common]
    for report in odd:
        yield Finding(
            "versions", "fail",
            f"node {report.host} differs from most: {_difference(report.versions, common)}. A "
            "launch leaves out slots that differ from its driver: install the same on all nodes",
        )  # fmt: skip
    if not odd:
        known = ", ".join(f"{name} {version}" for name, version in common.items())
        yield Finding("versions", "ok", f"alike on all nodes: {known}")
    if common != here:
        yield Finding(
            "versions", "warn",
            f"nodes and this machine differ: {_difference(common, here)}. Launch with --detach: "
            "an attached launch from here refuses the nodes",
        )  # fmt: skip


def _difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [n for n in {**ours, **theirs} if theirs.get(n) != ours.get(n)]
    return ", ".join(
        f"{name} {theirs.get(name, 'none')} instead of {ours.get(name, 'none')}" for name in names
    )


def _losses(reports: list[Report]) -> Iterator[Finding]:
    """Whether a node that is cut off is missed soon."""
    without = [report.host for report in reports if report.unset_flags]
    if without:
        flags = " ".join(f"{name}={value}" for name, value in HEALTH_FLAGS.items())
        yield Finding(
            "health checks", "warn",
            f"Ray takes minutes to notice that one of {', '.join(without)} is cut off. Start Ray "
            f"on all nodes with: {flags}",
        )  # fmt: skip
    else:
        yield Finding("health checks", "ok", "lost nodes are noticed soon")


def _clocks(reports: list[Report]) -> Iterator[Finding]:
    wrong = [r for r in reports if abs(r.skew_seconds) > SKEW_SECONDS]
    for report in wrong:
        yield Finding(
            "clock", "warn",
            f"node {report.host} is {report.skew_seconds:+.0f} s off the head: ages that status "
            "tells will be wrong. Nothing else depends on clocks",
        )  # fmt: skip
    if not wrong:
        yield Finding("clock", "ok", f"nodes agree within {SKEW_SECONDS:g} s")
