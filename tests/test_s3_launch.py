"""Whole runs in a bucket: every command reads it there, and the tables are those of a directory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Answer, call
from faulty_s3 import FaultyS3, faulty_s3
from populations import save_mlp
from processes import flatcensus
from s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, s3_server, use_s3

from pipeline import s3_requests
from pipeline.shards import list_shards
from pipeline.store import Store, open_store

TABLES = ("measurements", "summary", "layers", "bounds", "correlations", "matrix")
MANIFEST = """
name = "bucket"
[data]
name = "digits"
samples = 16
[[train]]
network = "mlp"
width = [6, 8]
depth = 1
optimizer = "adamw"
learning_rate = 0.01
steps = 30
[[checkpoints]]
source = "local"
paths = ["checkpoints/*"]
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 4
[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
[resources]
batch_size = 8
unit_seconds = 0.02
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("moto", tmp_path_factory.mktemp("moto")) as address:
        yield address


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    save_mlp(folder / "checkpoints/given")
    path = folder / "bucket.toml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture(scope="module")
def undisturbed(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same manifest run in a directory."""
    folder = tmp_path_factory.mktemp("directory") / "run"
    assert call("launch", manifest, "--run", folder, "--on", "inline").code == 0
    return open_store(folder)


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyS3]:
    with faulty_s3(server) as found:
        use_s3(monkeypatch, found.address)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(s3_requests, "PAUSE_SECONDS", (0.01, 0.05))
        yield found


def same_tables(one: Store, other: Store) -> None:
    for name in TABLES:
        key = f"tables/{name}.parquet"
        assert one.get(key) == other.get(key), name


def shard_names(store: Store) -> set[str]:
    return {name.key for names in list_shards(store).values() for name in names}


def said(answer: Answer) -> str:
    return answer.out + answer.err


def test_every_command_works_on_a_bucket_as_on_a_directory(
    proxy: FaultyS3, manifest: Path, undisturbed: Store, tmp_path: Path
):
    uri = f"s3://{BUCKET}/whole"
    store, answers = open_store(uri), []

    def command(*arguments: object, code: int = 0) -> Answer:
        answers.append(call(*arguments))
        assert answers[-1].code == code, said(answers[-1])
        return answers[-1]

    planned = command("plan", manifest, "--run", uri)
    assert shlex.split(planned.next_step)[-2:] == ["--run", uri]
    assert store.list() == []
    launched = command("launch", manifest, "--run", uri, "--on", "inline")
    assert f"report: {uri}/report.html" in launched.err
    same_tables(store, undisturbed)
    assert shard_names(store) == shard_names(undisturbed)
    assert {k.partition("/")[0] for k in store.list()} == {
        k.partition("/")[0] for k in undisturbed.list()
    }

    assert uri in command("status", uri).next_step
    rows = command("query", uri, "summary", "--json").records
    assert len(rows) == len(call("query", undisturbed.uri, "summary", "--json").records) > 0
    written = command("report", uri, "--json").records[0]
    assert written["report"] == f"{uri}/report.html"
    assert b"<html" in store.get("report.html")
    assert all(store.exists(place.removeprefix(f"{uri}/")) for place in written["files"])
    command("verify", uri)
    assert "nothing is left to do" in command("resume", uri, "--on", "inline").err

    for key in store.list():
        (path := tmp_path / "copy" / key).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(key))
    assert command("query", tmp_path / "copy", "summary", "--json").records == rows

    victim = min(shard_names(store))
    store.put(victim, store.get(victim)[:-100])
    assert "damaged" in said(command("verify", uri, code=3))
    assert any(key.startswith("quarantine/") for key in store.list())
    command("resume", uri, "--on", "inline")
    same_tables(store, undisturbed)

    texts = [said(answer) for answer in answers]
    texts += [store.get(key).decode("latin-1") for key in store.list()]
    texts += [p.read_text("latin-1") for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not any(secret in text for secret in (SECRET_KEY, ACCESS_KEY) for text in texts)


def test_a_run_behind_a_faulty_network_ends_with_the_same_tables_and_is_compacted(
    proxy: FaultyS3, manifest: Path, undisturbed: Store
):
    uri = f"s3://{BUCKET}/faulty"
    proxy.seed, proxy.rates = 3, {
        "500": 0.03, "slow_down": 0.03, "reset": 0.03, "lost": 0.06, "late_500": 0.03,
        "cut": 0.03, "upload_cut": 0.03, "conflict": 0.03,
    }  # fmt: skip
    assert call("launch", manifest, "--run", uri, "--on", "inline").code == 0
    assert sum(proxy.counts.values()) > 20
    store = open_store(uri)
    same_tables(store, undisturbed)
    assert call("compact", uri).code == 0
    assert store.list("shards/") == []
    store.delete("tables/summary.parquet")
    assert call("report", uri).code == 0
    assert call("verify", uri).code == 0
    proxy.rates = {}
    same_tables(store, undisturbed)
    assert shard_names(store) == shard_names(undisturbed)


def test_an_outage_stops_a_launch_with_exit_code_4_and_resume_ends_it(
    proxy: FaultyS3, manifest: Path, undisturbed: Store, monkeypatch: pytest.MonkeyPatch
):
    uri = f"s3://{BUCKET}/outage"
    monkeypatch.setenv(s3_requests.PATIENCE, "0.3")
    real = s3_requests.repeated

    def repeated(bucket, action, key, request):
        if action == "create" and key.startswith("outage/shards/") and proxy.num_requests > 60:
            proxy.rates = {"refuse": 1.0}
        return real(bucket, action, key, request)

    monkeypatch.setattr("pipeline.object_store.repeated", repeated)
    stopped = call("launch", manifest, "--run", uri, "--on", "inline")
    assert stopped.code == 4, said(stopped)
    assert "no success" in stopped.err
    assert proxy.address in stopped.err
    assert call("status", uri).code == 4
    monkeypatch.setattr("pipeline.object_store.repeated", real)
    proxy.rates = {}
    done = len(shard_names(open_store(uri)))
    assert 0 < done < len(shard_names(undisturbed))
    assert call("resume", uri, "--on", "inline").code == 0
    same_tables(open_store(uri), undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_read_trained_checkpoints_from_the_bucket(
    proxy: FaultyS3, manifest: Path, undisturbed: Store, tmp_path: Path
):
    uri = f"s3://{BUCKET}/ray"
    proxy.seed, proxy.rates = 8, {"500": 0.02, "lost": 0.04, "cut": 0.02}
    process = flatcensus("launch", manifest, "--run", uri, "--on", "local")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert proxy.counts["lost"] > 0
    proxy.rates = {}
    same_tables(open_store(uri), undisturbed)
    copies = tmp_path / "cache/flatcensus/folders"
    assert len(list(copies.glob("*/*/model.safetensors"))) == 2
    assert not list(copies.glob(".tmp-*"))
