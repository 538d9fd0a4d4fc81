"""Data sets on the hub in ImageNet's layout: photographs in Parquet files, over the loopback."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from fake_hub import COMMIT, FakeHub, Fault, fake_hub
from hub_world import TOKEN, point
from huggingface_hub import constants
from PIL import Image
from populations import save_mlp, write_manifest
from sklearn.datasets import load_digits, load_sample_images

from pipeline import hub_data, patience
from pipeline.entries import DataSpec
from pipeline.errors import DataError, HubError, ManifestError
from pipeline.hub_images import describe, open_images
from pipeline.manifest import parse_manifest
from pipeline.planned_images import open_dataset
from pipeline.resolve import resolve
from pipeline.run import start_run
from pipeline.worker import Workbench, run_unit
from tasks.idx import DatasetError

REPO = "ILSVRC/imagenet-1k"
CLASSES = ("tench, Tinca tinca", "daisy", "temple")
DIGITS = tuple(f"the {n}" for n in range(10))


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def features(names: Sequence[str] | None) -> dict[bytes, bytes]:
    label = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    return {b"huggingface": json.dumps(info).encode()}


def parquet(
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    *,
    names: Sequence[str] | None = CLASSES,
    columns: tuple[str, str] = ("image", "label"),
    rows: int = 3,
    raw: bool = False,
) -> bytes:
    """A file as ``datasets`` writes it, with small row groups."""
    values = [{"bytes": image, "path": f"{i}.JPEG"} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array(images, pa.binary()) if raw else pa.array(values, kind)
    table = pa.table({columns[0]: image, columns[1]: pa.array(labels)})
    buffer = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), **features(names)}
    pq.write_table(table.replace_schema_metadata(metadata), buffer, row_group_size=rows)
    return buffer.getvalue()


def photographs() -> tuple[list[bytes], list[int]]:
    """Eight crops of scikit-learn's two photographs: a temple and a flower."""
    china, flower = load_sample_images().images
    crops = [(china, 2), (flower, 1)]
    return (
        [encoded(image[60 * i : 60 * i + 200, :220]) for i in range(4) for image, _ in crops],
        [label for _ in range(4) for _, label in crops],
    )


def shards(split: str, count: int = 2) -> dict[str, bytes]:
    images, labels = photographs()
    each = len(images) // count
    return {
        f"data/{split}-{i:05d}-of-{count:05d}.parquet": parquet(
            images[i * each : (i + 1) * each], labels[i * each : (i + 1) * each]
        )
        for i in range(count)
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.001)
    files = {"README.md": b"---\n", **shards("validation"), **shards("train", 4)}
    with fake_hub({f"datasets/{REPO}": files}) as server:
        point(server, monkeypatch, tmp_path)
        yield server


def table(**changes: Any) -> DataSpec:
    return DataSpec(**({"name": "hub", "repo": REPO, "split": "validation"} | changes))


def add(hub: FakeHub, split: str, content: bytes) -> DataSpec:
    hub.files[f"datasets/{REPO}"][f"data/{split}-00000-of-00001.parquet"] = content
    return table(split=split)


def test_a_split_is_its_parquet_files_in_order_at_one_commit(hub: FakeHub):
    files = hub_data.files(table())
    assert [file.filename for file in files] == list(shards("validation"))
    assert {(file.repo_id, file.commit, file.repo_type) for file in files} == {
        (REPO, COMMIT, "dataset")
    }
    assert len(hub_data.files(table(), split="train")) == 4
    assert hub_data.files(table(split="data/validation")) == files
    assert hub_data.files(table(files=1)) == files[:1]
    assert hub_data.files(table(files=9)) == files


def test_a_plan_reads_the_ends_of_the_files_and_downloads_none(hub: FakeHub, tmp_path: Path):
    found = describe(table(), hub_data.files(table()))
    assert (len(found), found.class_names) == (8, CLASSES)
    assert not (tmp_path / "cache").exists()
    before = found.identity()
    assert describe(table(files=1), hub_data.files(table(files=1))).identity() != before
    assert describe(table(labels="ignore"), found.files).identity() == before


def test_a_footer_longer_than_expected_is_read_whole(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.hub_images.FOOTER_BYTES", 16)
    assert len(describe(table(), hub_data.files(table()))) == 8


def test_rows_are_the_images_and_labels_that_were_written(hub: FakeHub):
    files = hub_data.files(table())
    dataset = open_images(table(), files)
    images, labels = photographs()
    assert dataset.labels.tolist() == labels
    assert dataset.class_names == CLASSES
    for i in (7, 0, 3, 4):
        with Image.open(io.BytesIO(images[i])) as expected:
            assert np.array_equal(np.asarray(dataset.image(i)), np.asarray(expected))
    assert dataset.identity() == describe(table(), files).identity()


def test_bytes_without_a_struct_and_integers_without_names_are_read(hub: FakeHub):
    images, labels = photographs()
    data = add(hub, "plain", parquet(images, labels, names=None, raw=True))
    dataset = open_dataset(data, files=hub_data.files(data))
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.image(5).size == (220, 200)


def test_the_hubs_own_conversion_is_read_too(hub: FakeHub):
    images, labels = photographs()
    hub.files[f"datasets/{REPO}"]["default/holdout/0000.parquet"] = parquet(images, labels)
    data = table(split="holdout")
    assert len(open_images(data, hub_data.files(data))) == 8


def test_offline_and_for_a_commit_the_cache_suffices(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    files = hub_data.files(table())
    identity = open_images(table(), files).identity()
    hub.requests.clear()
    assert hub_data.files(table(revision=COMMIT)) == files
    assert open_images(table(), files).identity() == identity
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_data.files(table()) == files
    with pytest.raises(HubError, match=r"split 'train' is not whole in the cache .* HF_HUB_OFF"):
        hub_data.files(table(split="train"))
    assert hub.requests == []


def test_a_part_of_a_split_in_the_cache_is_not_taken_for_the_whole(hub: FakeHub):
    first = hub_data.files(table(files=1))
    open_images(table(files=1), first)
    assert len(hub_data.files(table(revision=COMMIT))) == 2
    assert hub_data.files(table(revision=COMMIT, files=1)) == first


def test_offline_files_without_a_count_in_their_names_need_their_number(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    content = {f"default/test/{i:04d}.parquet": parquet([b"x"], [i]) for i in range(2)}
    hub.files["datasets/o/r"] = content
    data = DataSpec(name="hub", repo="o/r")
    locked = hub_data.files(data)
    open_images(data.model_copy(update={"labels": "ignore"}), locked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="set files = their number"):
        hub_data.files(data, locked=locked)
    assert hub_data.files(data.model_copy(update={"files": 2}), locked=locked) == locked


def test_a_lock_is_not_asked_again_and_completed_at_its_commit(hub: FakeHub):
    whole = hub_data.files(table())
    hub.requests.clear()
    assert hub_data.files(table(), locked=whole) == whole
    assert hub_data.files(table(files=1), locked=whole) == whole[:1]
    assert hub.requests == []
    assert hub_data.files(table(), locked=whole[:1]) == whole
    assert {path for _, path in hub.requests} == {f"/api/datasets/{REPO}/revision/{COMMIT}"}


def test_a_gated_repository_says_how_to_get_in_and_shows_no_token(hub: FakeHub):
    hub.faults.append(Fault("/api/", status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(
        HubError, match=r"refuses access \(gated or private\)\. Accept its terms"
    ) as e:
        hub_data.files(table())
    files = hub_data.files(table())
    hub.faults.append(Fault("resolve", status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(HubError, match=r"the end of .*validation-00000.*refuses access"):
        describe(table(files=1), files[:1])
    assert TOKEN not in str(e.value)


def test_a_plan_is_made_although_the_hub_refuses_the_images_and_says_why(
    hub: FakeHub, tmp_path: Path
):
    save_mlp(tmp_path / "mlps/mlp0")
    path = write_manifest(
        tmp_path / "m.toml", checkpoints="mlps/*", samples=4,
        measurements='[[measurements]]\nmetric = "normalized_mls"\n',
    )  # fmt: skip
    text = path.read_text().replace('name = "digits"', f'name = "hub"\nrepo = "{REPO}"', 1)
    path.write_text(text)
    hub.faults.append(Fault("/api/", status=403, headers={"X-Error-Code": "GatedRepo"}, times=2))
    run = start_run(path, str(tmp_path / "run"))
    (item,) = run.plan().specs
    assert "refuses access (gated or private). Accept its terms" in item.spec.note
    with pytest.raises(HubError, match="refuses access"):
        resolve(run.manifest, run.store)


def test_the_token_is_sent_to_the_hub_and_not_to_the_server_of_the_files(hub: FakeHub):
    describe(table(), hub_data.files(table()))
    sent = {path.split("/")[1]: token for path, token in hub.tokens}
    assert sent == {"api": f"Bearer {TOKEN}", "datasets": f"Bearer {TOKEN}", "cdn": None}


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("test", r"files of split 'test' .* found Parquet files of .*data/train, data/validation"),
        ("torn", r"split 'torn' .* whole and in one folder"),
        ("both", r"one of several folders is split = \"folder/name\""),
    ],
)
def test_a_split_that_is_absent_torn_or_in_two_folders_is_refused(hub, split: str, words: str):
    files = hub.files[f"datasets/{REPO}"]
    files["data/torn-00001-of-00002.parquet"] = files["data/validation-00000-of-00002.parquet"]
    for folder in ("a", "b"):
        files[f"{folder}/both-00000-of-00001.parquet"] = b""
    with pytest.raises(DataError, match=words):
        hub_data.files(table(split=split))


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"columns": ("picture", "label")}, {}, r"no column 'image' .* picture \(struct"),
        ({"columns": ("image", "y")}, {}, r"integer labels in column 'label', found .*y \(int64\)"),
        ({}, {"image": "label"}, r"expected encoded images in column 'label' .* found int64"),
        ({"labels": ["a", "b"]}, {}, r"integer labels in column 'label', found .*label \(string\)"),
        ({"labels": [1, None]}, {}, r"an integer in every row .* 1 rows without"),
    ],
)
def test_columns_that_are_not_images_and_labels_are_named(hub: FakeHub, options, changes, words):
    images, _ = photographs()
    labels = options.pop("labels", [0, 1])
    data = add(hub, "odd", parquet(images[:2], labels, **options)).model_copy(update=changes)
    with pytest.raises(DatasetError, match=words):
        open_images(data, hub_data.files(data))
    unlabelled = data.model_copy(update={"labels": "ignore"})
    if "label" in words and "encoded" not in words:
        assert open_images(unlabelled, hub_data.files(data)).labels.tolist() == [-1, -1]


def test_a_file_that_is_no_parquet_and_rows_without_images_are_named(hub: FakeHub):
    data = add(hub, "broken", b"not Parquet at all, but long enough")
    with pytest.raises(DatasetError, match=r"broken-00000-of-00001.*expected a Parquet file"):
        describe(data, hub_data.files(data))
    images, _ = photographs()
    half = images[2][: len(images[2]) // 2]
    data = add(hub, "holes", parquet([images[0], None, half, images[1]], [0, 1, 2, 0]))
    dataset = open_images(data, hub_data.files(data))
    with pytest.raises(DatasetError, match=r"row group 0 row 1 \(1\.JPEG\): expected the bytes"):
        dataset.image(1)
    with pytest.raises(DatasetError, match=r"row 2 \(2\.JPEG\): expected a readable image"):
        dataset.image(2)
    assert dataset.image(3).mode == "RGB"


def test_a_parquet_file_with_damaged_metadata_is_named(hub: FakeHub):
    content = parquet([b"x"], [0])
    length = int.from_bytes(content[-8:-4], "little")
    damaged = content[: -8 - length] + b"\xff" * length + content[-8:]
    hub.files["datasets/o/r"] = {"data/test-00000-of-00001.parquet": damaged}
    data = DataSpec(name="hub", repo="o/r")
    with pytest.raises(DatasetError, match="expected a Parquet file"):
        describe(data, hub_data.files(data))


def test_files_of_one_split_with_other_classes_are_refused(hub: FakeHub):
    images, labels = photographs()
    for i, names in enumerate((CLASSES, CLASSES[::-1])):
        hub.files[f"datasets/{REPO}"][f"data/mixed-{i:05d}-of-00002.parquet"] = parquet(
            images, labels, names=names
        )
    data = table(split="mixed")
    with pytest.raises(DatasetError, match="another file of the split"):
        describe(data, hub_data.files(data))


def census(folder: Path, *metrics: str, data: str = "") -> Path:
    tables = "".join(f'[[measurements]]\nmetric = "{metric}"\n' for metric in metrics)
    path = folder / "m.toml"
    path.write_text(
        f'name = "m"\n[data]\nname = "hub"\nrepo = "{REPO}"\nsplit = "digits"\nsamples = 20\n{data}'
        f'[[checkpoints]]\nsource = "local"\npaths = ["checkpoints/*"]\n{tables}'
    )
    return path


@pytest.fixture
def digits(hub: FakeHub) -> tuple[np.ndarray, np.ndarray]:
    """Digits of scikit-learn as a split of two files, as PNG: no pixel is lost."""
    data: Any = load_digits()
    pixels, labels = np.rint(data.images[:40] * (255 / 16)).astype(np.uint8), data.target[:40]
    for i in range(2):
        part = slice(20 * i, 20 * i + 20)
        content = parquet(
            [encoded(image, "PNG") for image in pixels[part]], labels[part].tolist(),
            names=DIGITS, rows=7,
        )  # fmt: skip
        hub.files[f"datasets/{REPO}"][f"data/digits-{i:05d}-of-00002.parquet"] = content
    return pixels, labels


def test_a_launch_measures_pinned_files_and_asks_nobody_when_the_cache_is_full(
    hub: FakeHub, digits, tmp_path: Path
):
    save_mlp(tmp_path / "checkpoints/a", label_names=DIGITS)
    path = census(tmp_path, "accuracy", "normalized_mls")
    planned = call("plan", path, "--run", tmp_path / "run")
    assert planned.code == 0, planned.err
    answer = call("launch", path, "--run", tmp_path / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    resolved = [p for _, p in hub.requests if "/resolve/" in p]
    assert resolved
    assert all(f"/resolve/{COMMIT}/" in p for p in resolved)
    assert hub.bodies("data/train-00000-of-00004.parquet") == 0
    hub.requests.clear()
    hub.commit = "f" * 40  # the branch moves on
    again = call("launch", path, "--run", tmp_path / "run", "--on", "inline")
    assert again.code == 0, again.err
    assert hub.requests == []
    summary = pd.read_parquet(tmp_path / "run/tables/summary.parquet").set_index("series")
    assert summary.loc["accuracy", "num_samples"] == 20
    assert TOKEN not in answer.out + answer.err + (tmp_path / "run/hub.lock.json").read_text()


def test_a_worker_opens_the_planned_files_without_asking_for_the_newest(
    hub: FakeHub, digits, tmp_path: Path
):
    pixels, labels = digits
    save_mlp(tmp_path / "checkpoints/a", label_names=DIGITS[::-1])
    run = start_run(census(tmp_path, "accuracy"), str(tmp_path / "run"))
    (unit,) = run.plan().units
    assert unit.spec.label_map == tuple(range(9, -1, -1))
    hub.requests.clear()
    bench = Workbench()
    assert run_unit(unit, bench).failure is None
    assert {p for _, p in hub.requests if not p.startswith("/cdn/")} == {
        f"/datasets/{REPO}/resolve/{COMMIT}/data/digits-{i:05d}-of-00002.parquet" for i in range(2)
    }
    assert bench.subject is not None
    batch = bench.subject.batch(range(20))
    expected = {image.tobytes(): 9 - label for image, label in zip(pixels, labels, strict=True)}
    for image, target in zip(batch.inputs, batch.targets, strict=True):
        grey = ((image[0] * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert expected[grey.numpy().tobytes()] == int(target.argmax())


def test_fewer_rows_than_samples_and_foreign_classes_are_said_by_the_plan(
    hub: FakeHub, digits, tmp_path: Path
):
    save_mlp(tmp_path / "checkpoints/a", label_names=[f"fruit{i}" for i in range(10)])
    few = call("plan", census(tmp_path, "accuracy", data='files = 1\nrevision = "main"\n'))
    assert few.code == 0, few.err
    assert "none of the network's 10 (fruit0" in few.err + few.out
    path = census(tmp_path, "accuracy", data="files = 1\n")
    path.write_text(path.read_text().replace("samples = 20", "samples = 21"))
    many = call("plan", path)
    assert (many.code, "samples = 21, but hub digits has 20 images" in many.err) == (2, True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('name = "hub"', "hub needs repo"),
        ('name = "digits"\nrepo = "a/b"', "repo is a key of name = 'hub', found 'digits'"),
        ('name = "hub"\nrepo = "a/b"\nfiles = 0', "files: .* greater than or equal to 1"),
        ('name = "hub"\nrepo = "a/b"\ncsv = "x"', "csv is a key of name = 'image-folder'"),
    ],
)
def test_keys_that_do_not_fit_are_refused_with_their_line(data: str, words: str):
    text = f'name = "m"\n[data]\n{data}\n[[train]]\nnetwork = "mlp"\n'
    with pytest.raises(ManifestError, match=rf"m\.toml:\d: .*{words}"):
        parse_manifest(text, where="m.toml", root=Path("/nowhere"))
