"""What the nodes of a cluster are like, asked of each by a task of Ray.

``require_reach`` is the check before work: every node reads what was written into the run folder
from here, writes there, and sees the manifest's local paths. ``doctor`` has it done by a job, since
only a machine of the cluster can start tasks: ``python -m pipeline.nodes [RUN KEY]`` prints one
line of JSON. KEY is a question, an object in the run folder: the local paths to look for.

The module is imported on nodes that may lack dependencies, so it imports none at the top.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import FlatcensusError, ResourceError
from pipeline.versions import LIBRARIES, code_version

if TYPE_CHECKING:
    from pipeline.entries import Manifest
    from pipeline.store import Store

_log = logging.getLogger(__name__)
ANSWER_SECONDS = 60.0  # a first worker on a busy node takes some; silent nodes are named: chosen
MARK = "flatcensus-nodes: "  # before the JSON in a job's log
NEEDED = (
    "torch", "torchvision", "timm", "numpy", "scipy", "pydantic", "pyarrow", "pandas",
    "safetensors", "huggingface_hub", "PIL", "sklearn", "rich", "typer", "duckdb", "jinja2",
    "matplotlib", "obstore",
)  # fmt: skip
# Without them the loss of a node whose packets go nowhere is noticed after minutes.
HEALTH_FLAGS = {
    "RAY_grpc_client_keepalive_time_ms": "20000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


class Report(NamedTuple):
    """What a node said. ``silent`` if it did not answer; ``problems`` keep it from working."""

    node: str
    host: str
    cpus: float = 0.0
    gpus: float = 0.0
    versions: dict[str, str] = {}  # noqa: RUF012 (never changed)
    missing: tuple[str, ...] = ()
    unset_flags: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    skew_seconds: float = 0.0
    silent: bool = False


def require_reach(store: Store, manifest: Manifest) -> None:
    """Check that all nodes of the connected cluster can work on a run.

    Raises:
        ResourceError: A node cannot read and write the run folder, or lacks a path of the manifest.
    """
    with question(store, manifest) as key:
        reports = ask(store.uri, key)
    bad = [report for report in reports if report.problems]
    if bad:
        first = bad[0]
        others = f" (and {len(bad) - 1} more of {len(reports)} nodes)" if len(bad) > 1 else ""
        raise ResourceError(f"node {first.host}{others}: {'; '.join(first.problems)}")
    if silent := [report.host for report in reports if report.silent]:
        _log.warning("no answer from %s: work begins without it", ", ".join(silent))


@contextlib.contextmanager
def question(store: Store, manifest: Manifest) -> Iterator[str]:
    """Key of an object in the run folder that asks for the manifest's local paths."""
    # Beside the records of launches, since any other folder would be a stranger in a run.
    key = f"launches/probe-{secrets.token_hex(8)}"
    store.put_new(key, json.dumps({"key": key, "paths": local_paths(manifest)}).encode())
    try:
        yield key
    finally:
        for left in store.list(key):
            store.delete(left)


def local_paths(manifest: Manifest) -> list[str]:
    """Files and folders on disks that the manifest's work reads."""
    images = [manifest.data, *(entry.data for entry in manifest.train)]
    named = [path for data in images for path in (data.root, data.csv) if path is not None]
    folders = [str(path) for _, paths in manifest.local for path in paths]
    return list(dict.fromkeys([*named, *folders]))


def ask(uri: str = "", key: str = "") -> list[Report]:
    """Ask every living node of the cluster that Ray is connected to; with a run's question."""
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    began = time.time()
    pending = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        pending[task.options(scheduling_strategy=here).remote(uri, key)] = node
    reports, deadline = [], time.monotonic() + ANSWER_SECONDS
    while pending and time.monotonic() < deadline:
        ready, _ = ray.wait(list(pending), timeout=1.0, fetch_local=True)
        for reference in ready:
            node = pending.pop(reference)
            known = _known(node)
            try:
                answer = json.loads(ray.get(reference))
            except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
                why = str(error).strip().splitlines()[-1]
                reports.append(known._replace(problems=(f"its worker failed: {why}",)))
                continue
            except ray.exceptions.RayError:  # it was lost, perhaps before the head has noticed
                reports.append(known._replace(silent=True))
                continue
            reports.append(_told(known, answer, began))
    reports += [_known(node)._replace(silent=True) for node in pending.values()]
    return sorted(reports, key=lambda report: (report.host, report.node))


def _known(node: dict[str, Any]) -> Report:
    resources = node["Resources"]
    return Report(
        node["NodeID"], node["NodeManagerHostname"], resources.get("CPU", 0.0),
        resources.get("GPU", 0.0),
    )  # fmt: skip


def _told(known: Report, answer: dict[str, Any], began: float) -> Report:
    # The node read its clock after we asked and before we heard: outside of that it is wrong.
    ahead, behind = answer["now"] - time.time(), answer["now"] - began
    return known._replace(
        host=answer["host"], versions=answer["versions"], missing=tuple(answer["missing"]),
        unset_flags=tuple(answer["unset_flags"]), problems=tuple(answer["problems"]),
        skew_seconds=max(0.0, ahead) + min(0.0, behind),
    )  # fmt: skip


def _answer(uri: str, key: str) -> str:
    """On the node: JSON, because errors of ours may not be known to whoever reads it."""
    now = time.time()
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    missing = [name for name in NEEDED if util.find_spec(name) is None]
    problems = []
    if missing:
        problems.append(f"its Python lacks {', '.join(missing)}: install flatcensus's dependencies")
    elif uri:
        problems += _reach(uri, key)
    return json.dumps({
        "host": socket.gethostname(),
        "versions": {"python": sys.version.split()[0], "flatcensus": code_version(), **found},
        "missing": missing,
        "unset_flags": [name for name in HEALTH_FLAGS if name not in os.environ],
        "problems": problems,
        "now": now,
    })  # fmt: skip


def _reach(uri: str, key: str) -> list[str]:
    from pipeline.store import MissingKeyError, open_store

    try:
        store = open_store(uri)
        asked = json.loads(store.get(key))
        store.put_new(f"{key}-{secrets.token_hex(4)}", b"")
    except MissingKeyError:
        return [
            f"it does not see the run folder {uri}: what is written there from here is missing. "
            "Use a directory that all nodes share under this path, or s3://bucket/prefix"
        ]
    except FlatcensusError as error:
        return [f"it cannot use the run folder {uri}: {error}"]
    unseen = [path for path in asked["paths"] if not Path(path).exists()]
    if not unseen:
        return []
    more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
    return [
        f"it does not see {unseen[0]}{more}, which the manifest names: put it on a disk that all "
        "nodes share, under the same path"
    ]


def main(arguments: Sequence[str]) -> int:
    """As a job: print the reports for whoever submitted it."""
    import ray

    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    reports = ask(*arguments)
    sys.stdout.write(MARK + json.dumps([report._asdict() for report in reports]) + "\n")
    return 0


if __name__ == "__main__":
    from pipeline import nodes  # Ray sends functions of the program itself by value, classes too

    raise SystemExit(nodes.main(sys.argv[1:]))
