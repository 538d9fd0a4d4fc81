"""Run folders from strangers: nothing in them runs code, and nothing leads out of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Answer, call, files
from populations import save_mlp, write_manifest

from pipeline.errors import ManifestError, StoreError
from pipeline.hub_file import HubFile
from pipeline.lock import Lock, keep, run_lock
from pipeline.manifest import parse_manifest
from pipeline.sealed import seal, unseal
from pipeline.shards import read_shards
from pipeline.store import open_store

MEASUREMENTS = """
[[measurements]]
metric = "accuracy"
[[measurements]]
metric = "normalized_mls"
[[correlations]]
x = "accuracy"
y = "normalized_mls"
[[train]]
network = "mlp"
name = "trained"
width = 8
steps = 3
"""
pytestmark = pytest.mark.slow

READERS = ("status", "query", "correlate", "report", "verify")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A world with a finished run; tests copy it."""
    world = tmp_path_factory.mktemp("stranger")
    for seed in range(2):
        save_mlp(world / f"checkpoints/mlp{seed}", seed=seed)
    write_manifest(world / "m.toml", measurements=MEASUREMENTS)
    answer = call("launch", world / "m.toml", "--run", world / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    return world


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def commands(run: Path) -> dict[str, Answer]:
    """What every command says that is given a run folder alone."""
    answers = {name: call(name, run) for name in ("status", "query", "report", "verify", "compact")}
    return answers | {"resume": call("resume", run, "--on", "inline")}


def kinds(run: Path) -> dict[str, str]:
    """One file of each kind that a run folder holds, by the pattern it stands for."""
    found: dict[str, str] = {}
    for name in files(run):
        top, _, rest = name.partition("/")
        kind = f"{top}/{Path(rest).name}" if top in ("tables", "checkpoints", "packs") else top
        found.setdefault(kind if rest else name, name)
    return found


@pytest.mark.parametrize("is_packed", [False, True], ids=["loose", "packed"])
def test_a_pickle_bomb_in_any_file_of_a_run_is_never_run(
    run: Path, tmp_path: Path, is_packed: bool
):
    if is_packed:
        assert call("compact", run).code == 0
    sound = Path(shutil.copytree(run, tmp_path / "sound"))
    found = kinds(run)
    if is_packed:
        found = {kind: name for kind, name in found.items() if kind.startswith("packs")}
        assert len(found) >= 3, "rows, units and index"
    else:
        assert {"run.json", "manifest.toml", "resolved.json", "shards", "specs"} <= set(found)
        assert {"tables/summary.parquet", "checkpoints/model.safetensors"} <= set(found)
        assert {"tables/memo.json", "launches"} <= set(found)
    for kind, name in found.items():
        shutil.rmtree(run)
        shutil.copytree(sound, run)
        target = tmp_path / "ran"
        (run / name).write_bytes(pickle.dumps(Bomb(target)))
        for command, answer in commands(run).items():
            assert "unexpected" not in answer.err, (kind, command, answer.err)
            assert answer.code in (0, 2, 3, 4), (kind, command, answer.err)
        assert not target.exists(), f"a pickle in {name} was run"


@pytest.mark.parametrize("name", ["resolved.json", "run.json", "manifest.toml"])
def test_a_bomb_where_a_run_is_described_is_refused_by_name(run: Path, tmp_path: Path, name: str):
    (run / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    answer = call("query", run)
    assert answer.code in (2, 4)
    assert f"{name}" in answer.err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin"])
def test_a_bomb_in_place_of_trained_weights_is_refused(run: Path, tmp_path: Path, name: str):
    (folder,) = (run / "checkpoints").iterdir()
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, folder / name)
    call("resume", run, "--on", "inline")
    assert not (tmp_path / "ran").exists()


def test_arrow_metadata_of_a_shard_cannot_load_python_objects(run: Path, tmp_path: Path):
    """Arrow once unpickled the metadata of extension types; pandas' metadata names classes."""
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": bomb,
    }
    field = pa.field("value", pa.binary(), metadata=extension)
    schema = pa.schema([field], metadata={b"pandas": bomb, b"flatcensus.unit": bomb})
    table = pa.table([pa.array([bomb])], schema=schema)
    shard = next((run / "shards").rglob("*.parquet"))
    for path in (shard, run / "tables/summary.parquet", run / "tables/bounds.parquet"):
        pq.write_table(table, path, store_schema=True)
    for command, answer in commands(run).items():
        assert "unexpected" not in answer.err, (command, answer.err)
    assert not (tmp_path / "ran").exists()
    assert list((run / "quarantine").rglob("*.0")), "the false shard was set aside"


def lead_out(run: Path, outside: Path) -> dict[str, Callable[[], None]]:
    """Links in a run folder to a folder outside, each made by a function."""

    def linked(name: str, target: Path) -> Callable[[], None]:
        def make() -> None:
            place = run / name
            if place.is_dir():
                shutil.copytree(place, target, dirs_exist_ok=True)
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
            place.symlink_to(target)

        return make

    names = (
        "tables", "figures", "quarantine", "shards", "specs", "checkpoints", "launches", "packs",
    )  # fmt: skip
    spec = next((run / "shards").iterdir()).name
    return {
        **{name: linked(name, outside) for name in names},
        "one spec": linked(f"shards/{spec}", outside),
        "report.html": linked("report.html", outside / "report.html"),
        "resolved.json": linked("resolved.json", outside / "resolved.json"),
    }


@pytest.mark.parametrize(
    "name", ["tables", "figures", "quarantine", "shards", "specs", "checkpoints", "launches",
             "one spec", "report.html", "resolved.json"],
)  # fmt: skip
def test_links_out_of_a_run_folder_are_not_followed_when_writing(
    run: Path, tmp_path: Path, name: str
):
    outside = tmp_path / "outside"
    outside.mkdir()
    for mine in ("report.html", "resolved.json", ".tmp-1-a", "a_against_b.svg", "summary.parquet"):
        (outside / mine).write_text("mine")
        os.utime(outside / mine, (0, 0))  # old enough to be cleaned, were it a temporary of ours
    lead_out(run, outside)[name]()
    damaged = next((run / "shards").rglob("*.parquet"), None)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    if damaged is not None and not damaged.resolve().is_relative_to(outside):
        damaged.write_bytes(b"damaged")  # verify has something to set aside
    for answer in commands(run).values():
        assert "unexpected" not in answer.err, answer.err
    after = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("key", ["../../outside", "/etc", "..", ".hidden", "a/../../b"])
def test_spec_keys_of_a_forged_run_cannot_leave_it(run: Path, tmp_path: Path, key: str):
    known = unseal((run / "resolved.json").read_bytes())
    place = known["columns"].index("key")
    for record in known["specs"]:
        assert (run / "shards" / record[place]).is_dir()
        record[place] = key
    (run / "resolved.json").write_bytes(seal(known))
    for command in READERS:
        answer = call(command, run)
        assert "unexpected" not in answer.err, answer.err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    "name", ["../evil", "..", "a/b", ".hidden", "/etc/evil", "a\\b", "a\nb", ""]
)
def test_names_of_runs_and_labels_cannot_be_paths(tmp_path: Path, name: str):
    quoted = json.dumps(name)
    head = '[data]\nname = "digits"\n[[train]]\nnetwork = "mlp"\nsteps = 3\n'
    for text in (
        f"name = {quoted}\n{head}",
        f'name = "m"\n{head}[[measurements]]\nmetric = "normalized_mls"\nlabel = {quoted}\n',
        f'name = "m"\n{head}[[measurements]]\nmetric = "normalized_mls"\n'
        f'[[correlations]]\nx = {quoted}\ny = "normalized_mls"\n',
        f'name = "m"\n{head}[[measurements]]\nmetric = {quoted}\n',
    ):
        if "label" in text and name in ("", "..", ".hidden"):
            continue  # no label, or one that stands behind a metric's name everywhere
        with pytest.raises(ManifestError):
            parse_manifest(text, where="m.toml", root=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../../victim"},
        {"sha256": "*"},
        {"sha256": "A" * 64},
        {"filename": "../../victim"},
        {"commit": "../victim"},
        {"repo_id": "../../victim"},
    ],
    ids=lambda change: "-".join(*change.items()),
)
def test_a_forged_lock_cannot_name_files_outside_the_cache(tmp_path: Path, change: dict[str, str]):
    fields = {"repo_id": "timm/x", "commit": "1" * 40, "filename": "model.safetensors",
              "size": 3, "sha256": None} | change  # fmt: skip
    store = open_store(tmp_path / "run")
    keep({"timm:x": (HubFile(**fields),)}, store)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="is damaged"):
        run_lock(store)
    sound = Lock({"timm:x": (HubFile("timm/x", "1" * 40, "a/model.safetensors", 3, "a" * 64),)})
    store.put("hub.lock.json", sound.encode())
    assert run_lock(store) == sound


def test_a_link_in_a_circle_does_not_hang_a_listing(run: Path):
    (run / "shards/loop").symlink_to(run / "shards")
    assert len(list(read_shards(open_store(run)))) > 0
