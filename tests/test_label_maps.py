"""Labels from manifest to number: what enters keys, what is refused, what is measured without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import call
from PIL import Image
from populations import FOLDER_CLASSES, MLP_ARGS, save_mlp

from pipeline.errors import ManifestError
from pipeline.manifest import parse_manifest
from pipeline.resolve import resolve
from pipeline.run import start_run
from pipeline.specs import Resolved
from pipeline.store import open_store
from pipeline.worker import Workbench, run_unit
from tasks.checkpoints import describe_local, load_checkpoint
from tasks.datasets import load_dataset, preprocessing


def text(*metrics: str, data: str = "", name: str = "image-folder") -> str:
    root = 'root = "images"\n' if name == "image-folder" else ""
    tables = "".join(f'[[measurements]]\nmetric = "{metric}"\n' for metric in metrics)
    return (
        f'name = "m"\n[data]\nname = "{name}"\nsamples = 4\n{root}{data}'
        f'[[checkpoints]]\nsource = "local"\npaths = ["checkpoints/*"]\n{tables}'
    )


def resolved(folder: Path, document: str) -> Resolved:
    manifest = parse_manifest(document, where="m.toml", root=folder)
    return resolve(manifest, open_store(folder / "run"))


def keys(folder: Path, document: str) -> dict[str, str]:
    found = resolved(folder, document)
    assert not found.unresolved
    return {spec.metric: spec.key for spec in found.specs}


def images(folder: Path, classes: tuple[str, ...], each: int = 3) -> None:
    rng = np.random.default_rng(0)
    for name in classes:
        for index in range(each):
            path = folder / f"images/test/{name}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)


def fill(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.fill_(0.5)


# Of commit 3685a2d, before labels were mapped: results measured then must stay valid.
RECORDED = {"accuracy": "f7f53b3eb56aa5374e6407bc", "normalized_mls": "c67e133557e8d83dd70720c0"}
RECORDED_FOLDER = "65c6b52321734bb3e84ee515"


def test_keys_of_results_measured_before_labels_were_mapped_are_the_same(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a", change=fill)
    assert keys(tmp_path, text("accuracy", "normalized_mls", name="digits")) == RECORDED
    for index in range(6):
        path = tmp_path / f"images/test/class{index % 2}/{index}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 255\n" + bytes(range(index, index + 64)))
    assert keys(tmp_path, text("normalized_mls")) == {"normalized_mls": RECORDED_FOLDER}


def test_a_map_that_is_not_the_identity_is_in_the_keys_that_depend_on_labels(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a", label_names=FOLDER_CLASSES)
    images(tmp_path, ("class3", "class7"))
    specs = resolved(tmp_path, text("accuracy", "normalized_mls")).specs
    assert [spec.label_map for spec in specs] == [(3, 7), (3, 7)]
    assert ["label_map" in spec.fields for spec in specs] == [True, False]
    only_mls = keys(tmp_path, text("normalized_mls"))
    assert only_mls["normalized_mls"] == specs[1].key
    images(tmp_path / "other", ("class0", "class1"))
    save_mlp(tmp_path / "other/checkpoints/a", label_names=FOLDER_CLASSES)
    specs = resolved(tmp_path / "other", text("accuracy")).specs
    assert [(spec.label_map, "label_map" in spec.fields) for spec in specs] == [(None, False)]


def test_a_subset_of_the_classes_is_scored_at_its_own_outputs(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a", label_names=FOLDER_CLASSES)
    images(tmp_path, ("class3", "class7"), each=20)
    (tmp_path / "m.toml").write_text(text("accuracy").replace("samples = 4", "samples = 40"))
    answer = call("launch", tmp_path / "m.toml", "--run", tmp_path / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    dataset = load_dataset("image-folder", split="test", root=tmp_path / "images")
    loaded = load_checkpoint(describe_local(tmp_path / "checkpoints/a"))
    transform = preprocessing(loaded.data_config)
    with torch.no_grad():
        logits = loaded.model(torch.stack([transform(dataset.image(i)) for i in range(40)]))
    outputs = torch.tensor([(3, 7)[dataset.label(i)] for i in range(40)])
    expected = torch.nn.functional.cross_entropy(logits.double(), outputs)
    summary = pd.read_parquet(tmp_path / "run/tables/summary.parquet").set_index("series")["value"]
    assert summary["cross_entropy"] == pytest.approx(float(expected), rel=1e-5)  # float32 logits


def test_a_network_of_other_classes_is_a_row_and_the_others_are_measured(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/good", label_names=FOLDER_CLASSES)
    save_mlp(tmp_path / "checkpoints/other", label_names=[f"fruit{i}" for i in range(10)])
    save_mlp(tmp_path / "checkpoints/silent")
    images(tmp_path, ("class3", "class7"))
    (tmp_path / "m.toml").write_text(text("accuracy", "normalized_mls"))
    answer = call("launch", tmp_path / "m.toml", "--run", tmp_path / "run", "--on", "inline")
    assert answer.code == 3, answer.err
    failures = pd.read_parquet(tmp_path / "run/tables/failures.parquet").set_index("checkpoint")
    assert set(failures.index) == {"other", "silent"}
    other, silent = (failures.loc[[n], "failure_message"].iloc[0] for n in ("other", "silent"))
    assert "(class3, class7) are none of the network's 10 (fruit0, fruit1" in other
    assert "2 classes (class3, class7), the network has 10 outputs" in silent
    assert 'labels = "ignore"' in other
    summary = pd.read_parquet(tmp_path / "run/tables/summary.parquet")
    good = summary[summary["checkpoint"] == "good"]
    assert good["value"].notna().all()


def test_without_labels_any_network_is_measured_and_the_numbers_are_the_same(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a")
    images(tmp_path, ("class3", "class7"))
    for name, data in (("ignored", 'labels = "ignore"\n'), ("unneeded", "")):
        (tmp_path / f"{name}.toml").write_text(text("normalized_mls", "sharpness", data=data))
        run = start_run(tmp_path / f"{name}.toml", str(tmp_path / name))
        units = run.plan().units
        bench = Workbench()
        assert [run_unit(unit, bench).status for unit in units] == ["committed"] * 2
        batch = bench.subject.batch([0]) if bench.subject else None
        assert batch is not None
        assert batch.targets.isnan().all()
    found = [
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.parquet"))
        for name in ("ignored", "unneeded")
    ]
    assert found[0] == found[1]


def test_measurements_that_need_labels_are_refused_without_them_with_their_lines(tmp_path: Path):
    document = text("normalized_mls", "accuracy", "sharpness", "hessian_trace",
                    data='labels = "ignore"\n')  # fmt: skip
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, where="m.toml", root=tmp_path, folders=())
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["12", "16"]
    assert 'accuracy needs labels, but [data] labels = "ignore" leaves them unread' in lines[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{ name = "hub", repo = "a/b" }', "name = 'hub'"),
        ('{ name = "image-folder", root = "images", csv = "x.csv" }', "a csv"),
        ('{ name = "digits", labels = "ignore" }', 'labels = "ignore"'),
    ],
)
def test_networks_are_trained_on_whole_splits_with_labels(tmp_path: Path, data: str, words: str):
    document = (
        'name = "m"\n[data]\nname = "digits"\n[[train]]\nnetwork = "mlp"\n'
        f"steps = 2\ndata = {data}\n"
    )
    with pytest.raises(ManifestError, match=f"trained on whole splits with labels, found {words}"):
        resolved(tmp_path, document)


def test_a_trained_network_says_what_its_outputs_are(tmp_path: Path):
    (tmp_path / "m.toml").write_text(
        'name = "m"\n[data]\nname = "digits"\nsamples = 4\n[[train]]\nnetwork = "mlp"\n'
        'width = 8\ndepth = 1\nsteps = 2\n[[measurements]]\nmetric = "accuracy"\n'
    )
    answer = call("launch", tmp_path / "m.toml", "--run", tmp_path / "run", "--on", "inline")
    assert answer.code == 0, answer.err
    (config,) = (tmp_path / "run/checkpoints").glob("*/config.json")
    assert json.loads(config.read_text())["label_names"] == [str(n) for n in range(10)]


def test_folders_written_before_networks_named_their_outputs_load_as_before(tmp_path: Path):
    with_names: dict[str, Any] = json.loads(
        (save_mlp(tmp_path / "b", label_names=FOLDER_CLASSES) / "config.json").read_text()
    )
    without = json.loads((save_mlp(tmp_path / "a") / "config.json").read_text())
    assert with_names.pop("label_names") == list(FOLDER_CLASSES)
    assert with_names == without
    assert load_checkpoint(describe_local(tmp_path / "b")).num_outputs == MLP_ARGS["num_classes"]
