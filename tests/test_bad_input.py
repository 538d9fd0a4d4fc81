"""Manifests, run folders and machines that do not fit: one message, an exit code, nothing left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import call, files
from populations import save_mlp, write_manifest

from pipeline.errors import HubError, ManifestError, ResourceError
from pipeline.manifest import ResourceSpec
from pipeline.ray_cluster import slots_that_fit
from pipeline.run import open_run, start_run
from pipeline.shards import decode_shard

SHARPNESS = '[[measurements]]\nmetric = "adaptive_sharpness"\n'
TRAIN = '[[train]]\nnetwork = "vit"\n'


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for seed in range(2):
        save_mlp(tmp_path / f"checkpoints/mlp{seed}", seed=seed)
    return write_manifest(tmp_path / "m.toml", measurements=SHARPNESS + "max_draws = 2\n")


def launch(manifest: Path, run: Path | None = None):
    return call("launch", manifest, "--run", run or manifest.parent / "run", "--on", "inline")


@pytest.mark.parametrize(
    ("before", "after", "line", "words"),
    [
        ('"adaptive_sharpness"', '"adaptive_sharpnes"', 9, "Did you mean 'adaptive_sharpness'?"),
        ('"digits"', '"digit"', 3, "Did you mean 'digits'?"),
        ("samples = 24", 'samples = "24"', 4, "valid integer"),
        ("samples = 24", 'samples = 24\nsplit = "tset"', 2, "split must be 'train' or 'test'"),
        ('"digits"', '"image-folder"', 2, "image-folder needs root"),
        ("max_draws = 2", "max_samples = 8", 8, "max_samples = 8 is below samples = 24"),
        ("max_draws = 2", "maxdraws = 2", 10, "Did you mean 'max_draws'?"),
        ("[resources]", "[resources]\nbatch_size = 0", 13, "greater than or equal to 1"),
        ("[resources]", "[resources]\nunit_seconds = 0", 13, "greater than 0"),
        ('"checkpoints/*"', '"checkpoint/*"', 7, "no checkpoint directory matches"),
        ('source = "local"', 'source = "locale"', 6, "Did you mean 'local'?"),
    ],
)
def test_a_manifest_problem_has_its_line_and_runs_nothing(manifest, before, after, line, words):
    text = manifest.read_text()
    assert before in text
    manifest.write_text(text.replace(before, after))
    answer = launch(manifest)
    assert answer.code == 2
    assert f"{manifest}:{line}: " in answer.err
    assert words in answer.err
    assert answer.out == ""
    assert not (manifest.parent / "run").exists()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (TRAIN + "patch_size = 3\n", "patch_size = 3 does not divide the image size 8"),
        (TRAIN + "patch_size = 4\nheads = 5\n", "heads = 5 does not divide width = 48"),
        ('[[train]]\nnetwork = "lenet"\n', "lenet needs images of at least 12 pixels, found 8"),
        ('[[train]]\nnetwork = "mlp"\nname = "mlp0"\n', "two checkpoints are named 'mlp0'"),
        ('[[checkpoints]]\nsource = "local"\npaths = ["other/mlp0"]\n', "are named 'mlp0'"),
        ('[[checkpoints]]\nsource = "local"\npaths = ["checkpoints/mlp0"]\n', "are named 'mlp0'"),
    ],
)
def test_what_does_not_fit_the_images_or_the_others_is_said_before_anything_runs(
    manifest: Path, extra: str, words: str
):
    save_mlp(manifest.parent / "other/mlp0", seed=9)
    manifest.write_text(manifest.read_text() + extra)
    for command in ("plan", "launch"):
        options = ["--on", "inline"] if command == "launch" else []
        answer = call(command, manifest, "--run", manifest.parent / "run", *options)
        assert answer.code == 2, answer.err
        assert words in answer.err
        assert not (manifest.parent / "run").exists()


def test_more_samples_than_images_is_a_mistake_even_before_training(tmp_path: Path):
    path = tmp_path / "m.toml"
    path.write_text(
        'name = "m"\n[data]\nname = "digits"\nsamples = 501\n'
        f"{TRAIN}patch_size = 4\n[[measurements]]\nmetric = 'normalized_mls'\n"
    )
    answer = call("plan", path)
    assert answer.code == 2
    assert "samples = 501, but digits test has 500 images" in answer.err


def test_a_pickle_is_no_manifest(tmp_path: Path):
    (tmp_path / "m.toml").write_bytes(pickle.dumps({"name": "m"}))
    answer = call("plan", tmp_path / "m.toml")
    assert answer.code == 2
    assert "cannot read the manifest" in answer.err


def test_a_run_path_that_is_a_file_has_exit_code_4(manifest: Path):
    (manifest.parent / "run").write_text("mine")
    answer = launch(manifest)
    assert answer.code == 4
    assert f"{manifest.parent / 'run'}" in answer.err
    assert "a part of the path is a file" in answer.err or "not a directory" in answer.err
    assert (manifest.parent / "run").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system nobody can write")
def test_a_run_folder_that_cannot_be_made_has_exit_code_4(manifest: Path):
    answer = launch(manifest, Path("/proc/flatcensus"))
    assert answer.code == 4
    assert "cannot create /proc/flatcensus" in answer.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission_has_exit_code_4(manifest: Path):
    (manifest.parent / "run").mkdir(mode=0o500)
    answer = launch(manifest)
    assert answer.code == 4
    assert "permission denied" in answer.err


def test_the_run_of_another_manifest_is_not_overwritten(manifest: Path):
    assert launch(manifest).code == 0
    before = files(manifest.parent / "run")
    other = write_manifest(manifest.parent / "other.toml")
    answer = launch(other)
    assert answer.code == 2
    assert "is the run of manifest 'm', not of 'other'" in answer.err
    assert files(manifest.parent / "run") == before


@pytest.mark.parametrize("command", ["status", "query", "correlate", "report", "verify", "resume"])
def test_a_folder_that_is_no_run_is_named_and_left_alone(tmp_path: Path, command: str):
    answer = call(command, tmp_path)
    assert answer.code == 2
    assert f"{tmp_path} is not a run folder" in answer.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("run.json", b"{", 2, "run.json is damaged"),
        ("run.json", b"[]", 2, "run.json is damaged"),
        ("run.json", pickle.dumps({"name": "m"}), 2, "run.json is damaged"),
        ("run.json", b'{"run_version": 9, "name": "m", "root": "/"}', 2, "another flatcensus"),
        ("manifest.toml", b"name = [", 2, "run/manifest.toml: not valid TOML"),
        ("manifest.toml", b"\xff\xfe", 2, "run/manifest.toml is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named(manifest: Path, name: str, content: bytes, code, words):
    run = start_run(manifest, str(manifest.parent / "run"))
    run.store.put("run.json", b'{"run_version": 1, "name": "m", "root": "/"}')
    run.store.put("manifest.toml", manifest.read_bytes())
    run.store.put(name, content)
    answer = call("status", manifest.parent / "run")
    assert answer.code == code
    assert words in answer.err


def test_a_shard_damaged_after_the_launch_is_missing_not_averaged_away(manifest: Path):
    run = manifest.parent / "run"
    assert launch(manifest).code == 0
    tables = files(run / "tables")
    (name,) = [
        f"shards/{r['spec_key']}/0-24x0-2.parquet"
        for r in call("query", run, "units", "checkpoint=mlp0", "--json").records
    ]
    victim = run / name
    victim.write_bytes(pickle.dumps("nothing"))

    summary = call(
        "query", run, "select distinct checkpoint, status from summary order by 1", "--json"
    )
    assert summary.code == 0
    assert summary.records[0] == {"checkpoint": "mlp0", "status": "incomplete"}
    assert {r["checkpoint"] for r in summary.records[1:]} == {"mlp1"}
    assert not victim.exists()
    assert (run / f"quarantine/{name.removeprefix('shards/')}.0").exists()

    status = call("status", run)
    assert status.code == 0
    assert status.next_step == f"flatcensus resume {run}"
    assert call("resume", run, "--on", "inline").code == 0
    assert files(run / "tables")["summary.parquet"] == tables["summary.parquet"]
    assert files(run / "tables")["measurements.parquet"] == tables["measurements.parquet"]


def test_damaged_notes_about_stale_results_do_not_stop_a_plan(manifest: Path):
    run = manifest.parent / "run"
    assert launch(manifest).code == 0
    for note in (run / "specs").iterdir():
        note.write_bytes(pickle.dumps({}))
    manifest.write_text(manifest.read_text().replace("max_draws", "rho = 0.2\nmax_draws"))
    answer = call("plan", manifest, "--run", run)
    assert answer.code == 0
    assert answer.err.count("results of unknown settings") == 2


def test_files_that_are_no_shards_are_left_alone(manifest: Path, caplog: pytest.LogCaptureFixture):
    run = manifest.parent / "run"
    assert launch(manifest).code == 0
    stranger = next((run / "shards").iterdir()) / "notes.txt"
    stranger.write_text("mine")
    assert call("query", run).code == 0
    assert "notes.txt is not a shard's name" in caplog.text
    assert stranger.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none_has_exit_code_4(manifest: Path):
    manifest.write_text(manifest.read_text().replace("[resources]", "[resources]\nnum_gpus = 1"))
    answer = launch(manifest)
    assert answer.code == 4
    assert "resources.num_gpus = 1 per slot, but torch sees no CUDA device" in answer.err
    assert "Set num_gpus = 0" in answer.err
    assert not list(manifest.parent.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "slots"),
    [
        (8, 0, {"num_cpus": 1}, 8),
        (8, 0, {"num_cpus": 3}, 2),
        (8, 0, {"num_cpus": 1, "max_slots": 3}, 3),
        (2, 0, {"num_cpus": 1, "max_slots": 3}, 2),
        (16, 2, {"num_cpus": 2, "num_gpus": 1.0}, 2),
        (16, 2, {"num_cpus": 2, "num_gpus": 0.25}, 8),
        (4, 2, {"num_cpus": 2, "num_gpus": 0.25}, 2),
        (64, 10, {"num_cpus": 1, "num_gpus": 0.1}, 64),  # 1/0.1 rounds, 10/0.1 must not
        (200, 10, {"num_cpus": 1, "num_gpus": 0.1}, 100),
        (16, 8, {"num_cpus": 1, "num_gpus": 4.0}, 2),
    ],
)
def test_slots_that_fit_a_cluster(cpus: float, gpus: float, resources: dict, slots: int):
    node = {"Resources": {"CPU": float(cpus), "GPU": float(gpus), "memory": 1e9}}
    assert slots_that_fit([node], ResourceSpec(**resources), where="here") == slots


def test_a_slot_does_not_span_two_nodes():
    nodes = [{"Resources": {"CPU": 3.0, "GPU": 1.0}}, {"Resources": {"CPU": 3.0}}]
    assert slots_that_fit(nodes, ResourceSpec(num_cpus=2), where="here") == 2
    assert slots_that_fit(nodes, ResourceSpec(num_gpus=0.5), where="here") == 2
    with pytest.raises(ResourceError, match="here has 3 CPUs on a node"):
        slots_that_fit(nodes, ResourceSpec(num_cpus=6), where="here")


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (
            {"num_gpus": 1.0},
            "num_gpus = 1 per slot, but here has 0 GPUs on a node. Set num_gpus",
        ),
        ({"num_cpus": 5}, "num_cpus = 5 per slot, but here has 4 CPUs on a node. Lower num_cpus"),
    ],
)
def test_resources_that_no_slot_can_have_are_refused(resources: dict, words: str):
    with pytest.raises(ResourceError, match=words) as caught:
        slots_that_fit([{"Resources": {"CPU": 4.0}}], ResourceSpec(**resources), where="here")
    assert caught.value.exit_code == 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ("num_gpus = 99", "resources.num_gpus = 99 per slot, but this machine has"),
        ("num_cpus = 9999", "resources.num_cpus = 9999 per slot, but this machine has"),
    ],
)
def test_more_than_this_machine_has_is_refused_by_ray_too(manifest: Path, resources, words):
    manifest.write_text(manifest.read_text().replace("[resources]", f"[resources]\n{resources}"))
    answer = call("launch", manifest, "--run", manifest.parent / "run", "--on", "local")
    assert answer.code == 4
    assert words in answer.err
    assert not list(manifest.parent.rglob("*.parquet"))


def test_a_cluster_that_does_not_answer_has_exit_code_4(manifest: Path):
    with socket.socket() as closed:  # bound but not listening: nobody else takes the port
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        answer = call("launch", manifest, "--run", manifest.parent / "run", "--on", address)
    assert answer.code == 4
    assert f"no Ray cluster answers at '{address}'" in answer.err
    assert "ray start --head" in answer.err


def test_a_hub_that_does_not_answer_is_a_failure_per_checkpoint(manifest: Path, monkeypatch):
    def offline(name: str, *, revision: str | None = None):
        raise HubError("the hub does not answer")

    monkeypatch.setattr("pipeline.hub.resolve", offline)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    manifest.write_text(
        f'{manifest.read_text()}[[checkpoints]]\nsource = "timm"\nnames = ["{name}"]\n'
    )
    answer = launch(manifest)
    assert answer.code == 3
    (failure,) = call("query", manifest.parent / "run", "failures", "--json").records
    assert failure["checkpoint"] == name
    assert failure["failure_message"] == "the hub does not answer"


def test_a_deleted_checkpoint_stays_a_row_of_its_run(manifest: Path):
    run = manifest.parent / "run"
    assert launch(manifest).code == 0
    shutil.rmtree(manifest.parent / "checkpoints/mlp1")
    assert call("status", run).code == 0  # what was measured stands
    assert call("resume", run, "--on", "inline").code == 3
    answer = call("status", run)
    assert answer.code == 3
    assert "mlp1: " in answer.err
    assert "config.json: not found" in answer.err
    records = call("query", run, "summary", "--json").records
    assert {(r["checkpoint"], r["status"]) for r in records if r["checkpoint"] == "mlp1"} == {
        ("mlp1", "failed")
    }
    shutil.rmtree(manifest.parent / "checkpoints")  # the pattern matches nothing any more
    assert call("status", run).code == 3
    assert len(call("query", run, "summary", "--json").records) == len(records)
    with pytest.raises(ManifestError, match="no checkpoint directory matches"):
        start_run(manifest, str(run))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(
            f"NOT TESTED: a full disk, because mounting one needs root ({mounted.stderr!r})"
        )
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_stops_the_launch_and_room_lets_it_finish(small_disk: Path, manifest: Path):
    manifest.write_text(manifest.read_text().replace("max_draws = 2", "max_draws = 8"))
    assert launch(manifest).code == 0
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(b"x" * (free - 80_000))

    answer = launch(manifest, small_disk / "run")
    assert answer.code == 4
    assert "the disk is full. Free some space" in answer.err
    written = files(small_disk / "run")
    assert not [name for name in written if ".tmp-" in name]
    shards = [name for name in written if name.startswith("shards/")]
    assert shards, "the disk was full too early for this test"
    for name in shards:
        decode_shard(written[name], key=name)
    json.loads(written["run.json"])

    (small_disk / "ballast").unlink()
    answer = call("resume", small_disk / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    for name in ("measurements", "summary"):
        path = f"run/tables/{name}.parquet"
        assert (small_disk / path).read_bytes() == (manifest.parent / path).read_bytes()
    assert {k: v for k, v in files(small_disk / "run").items() if k in shards} == {
        name: written[name] for name in shards
    }, "committed shards were written again"
    assert open_run(str(small_disk / "run")).plan().num_failed == 0


def test_a_folder_of_other_files_is_not_made_a_run(manifest: Path):
    images = manifest.parent / "images"
    (images / "cats").mkdir(parents=True)
    (images / "cats/1.png").write_bytes(b"")
    answer = call("launch", manifest, "--run", images, "--on", "inline")
    assert answer.code == 2
    assert "is not empty and no run folder: it holds 'cats/1.png'" in answer.err
    assert files(images) == {"cats/1.png": b""}


def test_training_a_manifest_without_training_is_a_mistake(manifest: Path):
    answer = call("train", manifest, "--run", manifest.parent / "run", "--on", "inline")
    assert answer.code == 2
    assert "has no [[train]] table" in answer.err
