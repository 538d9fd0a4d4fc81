"""Measurements that take images of the training split: keys, refusals, runs from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import call, files
from PIL import Image
from populations import FOLDER_CLASSES, save_mlp, write_manifest

from pipeline.errors import DataError, ManifestError
from pipeline.manifest import parse_manifest
from pipeline.resolve import resolve
from pipeline.run import start_run
from pipeline.store import open_store
from pipeline.worker import Workbench, run_unit
from tasks.checkpoints import describe_local, load_checkpoint
from tasks.datasets import load_dataset, preprocessing, sample_order

TRAIN = "[[train]]\nnetwork = 'mlp'\nwidth = 8\ndepth = 1\nsteps = 2\n"


def measuring(*metrics: str) -> str:
    return "".join(f'[[measurements]]\nmetric = "{metric}"\n' for metric in metrics)


def text(*metrics: str, split: str = "test", samples: int = 4, extra: str = "") -> str:
    return (
        f'name = "m"\n[data]\nname = "image-folder"\nroot = "images"\nsplit = "{split}"\n'
        f'samples = {samples}\n[[checkpoints]]\nsource = "local"\npaths = ["checkpoints/a"]\n'
        f"{measuring(*metrics)}{extra}"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint and an image folder with three splits of two classes."""
    save_mlp(tmp_path / "checkpoints/a", label_names=FOLDER_CLASSES)
    rng = np.random.default_rng(0)
    for split, count in (("test", 6), ("val", 6), ("train", 8)):
        for index in range(count):
            path = tmp_path / f"images/{split}/class{index % 2}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path


def set_pixel(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


METRICS = ("normalized_mls", "accuracy", "generalization_gap")


def keys(folder: Path) -> dict[str, str]:
    manifest = parse_manifest(text(*METRICS), where="m.toml", root=folder)
    return {spec.metric: spec.key for spec in resolve(manifest, open_store(folder / "run")).specs}


@pytest.mark.parametrize(
    ("what", "touched"),
    [
        (lambda f: set_pixel(f / "images/train/class0/0.png"), {"generalization_gap"}),
        (lambda f: (f / "images/train/class1/7.png").unlink(), {"generalization_gap"}),
        (lambda f: set_pixel(f / "images/test/class0/0.png"), set(METRICS)),
        (lambda f: set_pixel(f / "images/val/class0/0.png"), set()),
    ],
)
def test_training_images_are_in_the_key_of_the_measurements_that_take_them_alone(
    folder: Path, what: Callable[[Path], object], touched: set[str]
):
    before = keys(folder)
    what(folder)
    after = keys(folder)
    assert {metric for metric in METRICS if before[metric] != after[metric]} == touched


def test_keys_without_training_images_do_not_depend_on_whether_a_neighbour_takes_them(folder: Path):
    manifest = parse_manifest(text("normalized_mls", "accuracy"), where="m.toml", root=folder)
    found = resolve(manifest, open_store(folder / "run")).specs
    both = keys(folder)
    assert {spec.metric: spec.key for spec in found} == {
        metric: both[metric] for metric in ("normalized_mls", "accuracy")
    }


def test_training_images_are_not_read_where_nobody_takes_them(folder: Path):
    (folder / "images/train/class0/0.png").write_bytes(b"not an image")
    (folder / "m.toml").write_text(text("accuracy"))
    run = start_run(folder / "m.toml", str(folder / "run"))
    bench = Workbench()
    assert [run_unit(unit, bench).status for unit in run.plan().units] == ["committed"]
    assert {split for _, _, split in bench.datasets} == {"test"}


def refusal(folder: Path, document: str, error: type[Exception]) -> str:
    def planned() -> None:
        manifest = parse_manifest(document, where="m.toml", root=folder)
        resolve(manifest, open_store(folder / "run"))

    with pytest.raises(error) as caught:
        planned()
    return str(caught.value)


def test_an_image_folder_without_splits_is_refused_in_the_plan_with_what_is_missing(tmp_path: Path):
    save_mlp(tmp_path / "checkpoints/a", label_names=FOLDER_CLASSES)
    for label in range(2):
        (tmp_path / f"images/class{label}").mkdir(parents=True)
        for index in range(4):
            path = tmp_path / f"images/class{label}/{index}.png"
            Image.fromarray(np.full((8, 8), index, np.uint8)).save(path)
    (tmp_path / "m.toml").write_text(text("generalization_gap"))
    answer = call("plan", tmp_path / "m.toml", "--run", tmp_path / "run")
    assert answer.code == 4
    images = tmp_path / "images"
    assert "generalization_gap needs images of the training split" in answer.err
    assert f"no folder {images}/train" in answer.err
    assert f"{images}/train/<class>/ and the others into {images}/test/<class>/" in answer.err
    assert not (tmp_path / "run").exists()
    (tmp_path / "m.toml").write_text(text("accuracy"))
    assert call("plan", tmp_path / "m.toml", "--run", tmp_path / "run").code == 0


def test_a_missing_training_split_is_refused(folder: Path):
    (folder / "images/train").rename(folder / "images/training")
    words = refusal(folder, text("generalization_gap"), DataError)
    assert f"there is no folder {folder}/images/train." in words


def test_training_images_of_other_classes_are_refused(folder: Path):
    (folder / "images/train/class1").rename(folder / "images/train/class2")
    words = refusal(folder, text("generalization_gap"), DataError)
    assert "classes ('class0', 'class2'), those of split 'test' ('class0', 'class1')" in words


def test_fewer_training_images_than_samples_are_refused(folder: Path):
    for index in range(3, 8):
        (folder / f"images/train/class{index % 2}/{index}.png").unlink()
    words = refusal(folder, text("generalization_gap"), ManifestError)
    assert "samples = 4, but generalization_gap needs as many training images" in words
    assert "image-folder train has 3" in words


def test_training_images_are_not_compared_with_themselves(folder: Path):
    words = refusal(folder, text("accuracy", "generalization_gap", split="train"), ManifestError)
    assert words.startswith("m.toml:12: generalization_gap compares the training images with oth")
    assert "Choose another split" in words
    assert "\n" not in words


def test_a_series_that_the_trainings_give_is_refused_with_its_line(folder: Path):
    document = text("accuracy", "generalization_gap", extra=TRAIN)
    words = refusal(folder, document, ManifestError)
    assert words == (
        "m.toml:12: generalization_gap gives 'generalization_gap', and so does every [[train]] "
        'table, over all images of its training. Add label = "..." to the measurement, or '
        "remove it"
    )


def test_with_a_label_it_stands_beside_the_trainings(folder: Path):
    metric = 'metric = "generalization_gap"\n'
    document = text("accuracy", "generalization_gap", extra=TRAIN).replace(
        metric, f'{metric}label = "sampled"\n'
    )
    manifest = parse_manifest(
        document + "[[correlations]]\nx = 'generalization_gap'\ny = 'generalization_gap@sampled'\n",
        where="m.toml", root=folder,
    )  # fmt: skip
    assert manifest.measurements[1].series("train_accuracy") == "train_accuracy@sampled"


@pytest.mark.parametrize("split", ["test", "val"])
def test_any_other_split_is_compared_with_the_training_images(folder: Path, split: str):
    manifest = parse_manifest(text("generalization_gap", split=split), where="m", root=folder)
    (spec,) = resolve(manifest, open_store(folder / "run")).specs
    train = load_dataset("image-folder", split="train", root=folder / "images")
    assert spec.training_identity == train.identity()
    assert spec.data_identity != train.identity()


def test_training_images_that_change_between_plan_and_unit_are_not_measured(folder: Path):
    (folder / "m.toml").write_text(text("generalization_gap"))
    (unit,) = start_run(folder / "m.toml", str(folder / "run")).plan().units
    set_pixel(folder / "images/train/class0/0.png")
    outcome = run_unit(unit, Workbench())
    assert outcome.failure_class == "permanent"
    assert outcome.failure is not None
    assert "the train images of 'image-folder' changed after the plan" in outcome.failure.message


def test_a_bench_with_the_checkpoint_on_it_still_gets_the_training_images(folder: Path):
    (folder / "m.toml").write_text(text("accuracy", "generalization_gap", "normalized_mls"))
    units = start_run(folder / "m.toml", str(folder / "run")).plan().units
    bench = Workbench()
    assert [run_unit(unit, bench).status for unit in units] == ["committed"] * 3


BATCHES = "batch_size = 16\nunit_seconds = 1e-6"


def launched(folder: Path, name: str) -> dict[str, bytes]:
    path = write_manifest(
        folder / f"{name}.toml", samples=64, measurements=measuring("accuracy", METRICS[2]),
        resources=BATCHES, extra="[[correlations]]\nx = 'accuracy'\ny = 'test_accuracy'\n",
    )  # fmt: skip
    path.write_text(path.read_text().replace(f'name = "{name}"', 'name = "m"'))
    answer = call("launch", path, "--run", folder / name, "--on", "inline")
    assert answer.code == 0, answer.err
    return files(folder / name / "tables")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gap")
    for seed in range(3):
        save_mlp(folder / f"checkpoints/mlp{seed}", seed=seed)
    launched(folder, "one")
    return folder


def test_two_runs_give_the_same_bytes(finished: Path):
    one, two = files(finished / "one/tables"), launched(finished, "two")
    for name in ("measurements", "summary", "correlations"):
        assert one[f"{name}.parquet"] == two[f"{name}.parquet"]


def test_a_run_measures_the_first_images_of_both_orders(finished: Path):
    """From the data sets, the frozen order and the network itself, image by image in float64."""
    summary = pd.read_parquet(finished / "one/tables/summary.parquet")
    for seed in range(3):
        ref = describe_local(finished / f"checkpoints/mlp{seed}")
        loaded = load_checkpoint(ref, dtype=torch.float64)
        transform = preprocessing(loaded.data_config)
        shares = {}
        for split in ("train", "test"):
            images = load_dataset("digits", split=split)
            order = sample_order(images.identity(), seed=0, length=len(images))[:64]
            inputs = torch.stack([transform(images.image(int(i))) for i in order]).double()
            with torch.no_grad():
                answers = loaded.model(inputs).argmax(1).tolist()
            shares[split] = np.mean([images.label(int(i)) for i in order] == np.array(answers))
        mine = summary[summary["checkpoint"] == f"mlp{seed}"].set_index("series")["value"]
        assert mine["train_accuracy"] == shares["train"]
        assert mine["test_accuracy"] == mine["accuracy"] == shares["test"]
        assert mine["generalization_gap"] == pytest.approx(
            100 * (shares["train"] - shares["test"]), rel=1e-12
        )
        assert mine["test_half_squared_error"] == mine["loss"]
        assert mine["test_cross_entropy"] == mine["cross_entropy"]
    assert len(set(summary.loc[summary["series"] == "generalization_gap", "value"])) > 1


def test_the_report_names_both_sets_of_images_and_the_run_is_read_without_them(finished: Path):
    report = (finished / "one/report.html").read_text()
    for split in ("train", "test"):
        assert load_dataset("digits", split=split).identity() in report
    assert "Generalization gap" in report or "generalization_gap" in report
    assert call("status", finished / "one").code == 0


def test_smaller_batches_after_a_memory_failure_keep_the_training_images(finished: Path):
    run = start_run(finished / "one.toml", str(finished / "fresh"))
    unit = next(u for u in run.plan().units if u.spec.metric == "generalization_gap")
    bench = Workbench()
    assert run_unit(unit, bench).status == "committed"
    outcome = run_unit(replace(unit, batch_size=8), bench)
    assert outcome.status == "duplicate"
    assert outcome.failure is None
