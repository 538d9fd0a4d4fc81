"""Networks and images that cannot be measured: each is a failure with its reason, never a gap.

One launch audits two sound networks among many spoiled ones; the tests read what it left.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Answer, call
from PIL import Image
from populations import DATA_CONFIG, MLP_ARGS, save_mlp, write_manifest
from safetensors.torch import load_file, save_file

from pipeline.run import open_run
from tasks.checkpoint_folder import save_checkpoint
from tasks.datasets import load_dataset, sample_order
from tasks.networks import build_network

SAMPLES = 64  # two units, because sensitivity is cut at multiples of 32
PAIR = """
[[measurements]]
metric = "normalized_mls"
[[measurements]]
metric = "adaptive_sharpness"
max_draws = 2
[[correlations]]
x = "normalized_mls"
y = "adaptive_sharpness"
"""


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def bomb(folder: Path) -> bytes:
    """A pickle that would leave ``exploded`` beside the checkpoints."""
    return pickle.dumps({"weight": Bomb(folder.parents[1] / "exploded")}, protocol=2)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = value | config[key] if key == "" else {**config[key], **value}  # type: ignore
    path.write_text(json.dumps(config))


def replaced_by(name: str, content) -> object:
    def spoil(folder: Path) -> None:
        weights(folder).unlink()
        (folder / name).write_bytes(content(folder))

    return spoil


def save_other(folder: Path, **changes: object) -> None:
    """A sound network of other sizes."""
    arguments = {**MLP_ARGS, **changes}
    channels = int(str(arguments["in_chans"]))
    torch.manual_seed(0)
    save_checkpoint(
        build_network("flatcensus_mlp", arguments), folder, architecture="flatcensus_mlp",
        model_args=arguments, family="mlp",
        data_config={**DATA_CONFIG, "input_size": (channels, 8, 8), "mean": (0.5,) * channels,
                     "std": (0.5,) * channels},
    )  # fmt: skip


def overwrite_weights(folder: Path, width: int) -> None:
    other = build_network("flatcensus_mlp", {**MLP_ARGS, "width": width})
    save_file(other.state_dict(), weights(folder))


def set_nan(folder: Path) -> None:
    state = load_file(weights(folder))
    state["1.weight"][0, 0] = torch.nan
    save_file(state, weights(folder))


def bright_pixel() -> tuple[int, float]:
    """A pixel and a level that only some of samples 32 to 63 exceed, and none before."""
    images = load_dataset("digits", split="test")
    order = sample_order(images.identity(), seed=0, length=len(images))[:SAMPLES]
    pixels = (np.stack([np.asarray(images.image(i)) for i in order]).reshape(SAMPLES, -1) / 255 - 0.5) / 0.5  # fmt: skip  # noqa: E501
    gap = pixels[32:].max(axis=0) - pixels[:32].max(axis=0)
    pixel = int(gap.argmax())
    assert gap[pixel] > 0.05
    return pixel, float(pixels[:32, pixel].max() + gap[pixel] / 2)


def overflow_for_some(folder: Path) -> None:
    """One logit becomes infinite where a pixel is bright."""
    pixel, level = bright_pixel()
    state = load_file(weights(folder))
    state["1.weight"][0].zero_()
    state["1.weight"][0, pixel] = 1000.0
    state["1.bias"][0] = -1000.0 * level
    state["3.weight"][0].zero_()
    state["3.weight"][0, 0] = 3e38  # tanh is 1 for a bright pixel, -1 for the others
    state["3.bias"][0] = 1e38
    save_file(state, weights(folder))


# What is wrong, the class of its failure, and words that its reason must hold.
SPOILED = {
    "no-weights": (lambda f: weights(f).unlink(), "unresolved", "no weights in a format"),
    "no-config": (lambda f: (f / "config.json").unlink(), "unresolved", "config.json: not found"),
    "config-text": (
        lambda f: (f / "config.json").write_text("{"), "unresolved", "config.json: expected JSON",
    ),
    "config-bomb": (
        lambda f: (f / "config.json").write_bytes(bomb(f)), "unresolved", "expected JSON",
    ),
    "unknown-network": (
        lambda f: (f / "config.json").write_text('{"architecture": "flatcensus_mpl"}'),
        "unresolved", "Did you mean flatcensus_mlp",
    ),
    "unknown-argument": (
        lambda f: edit_config(f, model_args={"dept": 2}), "unresolved", "dept",
    ),
    "two-channels": (
        lambda f: save_other(f, in_chans=2), "unresolved", "images have 1 (grey) or 3 (RGB)",
    ),
    "statistics": (
        lambda f: edit_config(f, pretrained_cfg={"mean": [0.1, 0.2, 0.3]}),
        "unresolved", "mean has 3 values",
    ),
    "pickle": (replaced_by("model.pkl", bomb), "unresolved", "Other formats can execute code"),
    "bomb-bin": (replaced_by("pytorch_model.bin", bomb), "permanent", "refused"),
    "bomb-pt": (replaced_by("model.pt", bomb), "permanent", "refused"),
    "bomb-safetensors": (replaced_by("model.safetensors", bomb), "permanent", "damaged"),
    "truncated": (
        lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-500]), "permanent", "damaged",
    ),
    "empty": (lambda f: weights(f).write_bytes(b""), "permanent", "found 0 bytes"),
    "other-width": (
        lambda f: overwrite_weights(f, 20), "permanent", "weights of another architecture",
    ),
    "nan-weights": (set_nan, "permanent", "1 tensors hold NaN or infinity: 1.weight"),
    "five-classes": (lambda f: save_other(f, num_classes=5), "unresolved", "the network has 5"),
    "some-overflow": (overflow_for_some, "permanent", "34"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    save_mlp(folder / "checkpoints/sound0", seed=100)
    save_other(folder / "checkpoints/sound-rgb", in_chans=3)
    for seed, (name, (spoil, _, _)) in enumerate(SPOILED.items()):
        spoil(save_mlp(folder / f"checkpoints/{name}", seed=seed))
    write_manifest(
        folder / "m.toml", samples=SAMPLES, measurements=PAIR, resources="unit_seconds = 1e-6"
    )
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> Answer:
    return call("launch", folder / "m.toml", "--run", folder / "run", "--on", "inline")


@pytest.fixture(scope="module")
def tables(folder: Path, launched: Answer) -> dict[str, pd.DataFrame]:
    names = ("summary", "correlations", "failures", "units")
    return {name: pd.read_parquet(folder / f"run/tables/{name}.parquet") for name in names}


def test_launch_finishes_with_exit_code_3_and_says_how_to_go_on(folder: Path, launched: Answer):
    assert launched.code == 3, launched.err
    assert f"flatcensus query {folder / 'run'} failures" in launched.err
    assert launched.next_step == f"flatcensus resume {folder / 'run'} --on inline"
    assert call("status", folder / "run").code == 3


def test_no_bomb_went_off(folder: Path, launched: Answer):
    assert not (folder / "exploded").exists()
    (folder / "run").exists()
    pickle.loads(bomb(folder / "checkpoints/x"))  # or this test could not fail
    assert (folder / "exploded").exists()
    (folder / "exploded").unlink()


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_a_failure_with_its_reason(name: str, tables):
    _, kind, words = SPOILED[name]
    failures = tables["failures"][tables["failures"]["checkpoint"] == name]
    assert set(failures["failure_class"]) == {kind}
    assert failures["failure_message"].str.contains(words, regex=False).all(), list(
        failures["failure_message"]
    )
    assert failures["failure_hint"].str.contains("flatcensus resume RUN").all()
    summary = tables["summary"][tables["summary"]["checkpoint"] == name]
    failed = summary[summary["status"] == "failed"]
    assert "normalized_mls" in set(failed["series"])
    assert failed["value"].isna().all()
    assert failed["status_text"].str.contains(words, regex=False).all()


@pytest.mark.parametrize("name", ["sound0", "sound-rgb"])
def test_sound_checkpoints_beside_them_are_complete(name: str, tables):
    summary = tables["summary"][tables["summary"]["checkpoint"] == name]
    assert set(summary["series"]) == {
        "normalized_mls", "mls", "adaptive_sharpness", "squared_error",
    }  # fmt: skip
    assert summary["value"].notna().all()
    assert set(summary["num_missing"]) == {0}


def test_every_planned_checkpoint_has_its_rows_and_is_counted(tables):
    summary, correlations = tables["summary"], tables["correlations"]
    assert set(summary["checkpoint"]) == {*SPOILED, "sound0", "sound-rgb"}
    assert set(summary.groupby("checkpoint").size()) == {4}
    everyone = correlations[correlations["group"] == "all"]
    assert set(everyone["n"]) == {2}
    assert set(everyone["n_missing"]) == {len(SPOILED)}


def test_only_the_images_that_overflow_are_missing(folder: Path, tables):
    units = tables["units"][tables["units"]["checkpoint"] == "some-overflow"]
    sensitivity = units[units["metric"] == "normalized_mls"].set_index("start")["status"]
    assert dict(sensitivity) == {0: "ok", 32: "failed"}
    summary = tables["summary"].set_index(["checkpoint", "series"])
    assert summary.loc[("some-overflow", "normalized_mls"), "num_missing"] == 32


def test_permanent_failures_are_tried_once(tables):
    failed = tables["units"][tables["units"]["status"] == "failed"]
    assert set(failed["attempt"]) == {1}


def test_a_mended_checkpoint_is_measured_on_resume(folder: Path, launched: Answer, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/checkpoints"
    for name in SPOILED:
        if name != "nan-weights":
            shutil.rmtree(path / name)
    (tmp_path / "copy/run/run.json").unlink()  # it names the folders of the original
    save_mlp(path / "nan-weights", seed=7)
    answer = call(
        "launch", tmp_path / "copy/m.toml", "--run", tmp_path / "copy/run", "--on", "inline"
    )
    assert answer.code == 0, answer.err
    _, tables = open_run(str(tmp_path / "copy/run")).reduce()
    assert set(tables.summary["checkpoint"]) == {"sound0", "sound-rgb", "nan-weights"}
    assert tables.summary["value"].notna().all()


def image_folder(root: Path, images: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for index in range(images):
        path = root / f"test/class{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return root


def folder_manifest(path: Path, samples: int = 4) -> Path:
    write_manifest(path, samples=samples)
    text = path.read_text().replace('name = "digits"', 'name = "image-folder"\nroot = "images"')
    path.write_text(text)
    return path


@pytest.mark.parametrize("content", [b"not an image", b"", "bomb"])
def test_an_unreadable_image_is_a_failure_that_names_the_file(tmp_path: Path, content):
    save_mlp(tmp_path / "checkpoints/a")
    victim = image_folder(tmp_path / "images") / "test/class1/1.png"
    victim.write_bytes(bomb(tmp_path / "checkpoints/a") if content == "bomb" else content)
    run = tmp_path / "run"
    answer = call("launch", folder_manifest(tmp_path / "m.toml"), "--run", run, "--on", "inline")
    assert answer.code == 3
    (failure,) = call("query", run, "failures", "--json").records
    assert failure["failure_class"] == "permanent"
    assert f"{victim}: expected a readable image" in failure["failure_message"]
    assert not (tmp_path / "exploded").exists()

    image_folder(tmp_path / "images")  # a mended image is another data set, measured anew
    assert call("resume", run, "--on", "inline").code == 0
    assert call("query", run, "failures", "--json").records == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: shutil.rmtree(root), "image-folder needs root"),
        (lambda root: (root / "test/class0/notes.txt").write_text("x"), "not an image by its name"),
        (lambda root: (root / "test/class2").mkdir(), "empty. Remove the folder or fill it"),
        (lambda root: (root / "test").rename(root / "val"), "has no split 'test', found: val"),
    ],
)
def test_images_that_cannot_be_had_stop_everything_with_exit_code_4(tmp_path: Path, spoil, words):
    save_mlp(tmp_path / "checkpoints/a")
    spoil(image_folder(tmp_path / "images"))
    run = tmp_path / "run"
    answer = call("launch", folder_manifest(tmp_path / "m.toml"), "--run", run, "--on", "inline")
    assert answer.code == 4
    assert words in answer.err
    assert not run.exists()


def test_images_that_change_between_plan_and_unit_are_not_measured(tmp_path: Path):
    from pipeline.worker import Workbench, run_unit

    save_mlp(tmp_path / "checkpoints/a")
    image_folder(tmp_path / "images")
    from pipeline.run import start_run

    run = start_run(folder_manifest(tmp_path / "m.toml"), str(tmp_path / "run"))
    (unit,) = run.plan().units
    victim = tmp_path / "images/test/class0/0.png"
    victim.write_bytes((tmp_path / "images/test/class1/1.png").read_bytes())
    outcome = run_unit(unit, Workbench())
    assert outcome.failure is not None
    assert "changed after the plan was made" in outcome.failure.message
    assert not (tmp_path / "run/shards").exists()
