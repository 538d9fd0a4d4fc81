"""What determines a number is in its key, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from populations import FOLDER_CLASSES, save_mlp
from safetensors.torch import load_file, save_file

import pipeline.resolve
from pipeline.hub import HubFile
from pipeline.lock import LOCK, keep
from pipeline.manifest import parse_manifest
from pipeline.resolve import resolve
from pipeline.specs import Task, spec_key
from pipeline.store import Store, open_store
from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.sensitivity import NormalizedMls
from tasks.training_settings import TrainSettings

BASE: dict[str, Any] = {
    "name": '"keys"',
    "seed": "0",
    "output": '"sigmoid"',
    "dtype": '"float32"',
    "data.name": '"image-folder"',
    "data.root": '"images"',
    "data.split": '"test"',
    "data.samples": "4",
    "paths": '["checkpoints/a"]',
    "family": '"one"',
    "mls.method": '"lanczos"',
    "mls.tolerance": "1e-3",
    "mls.failure_probability": "1e-9",
    "mls.max_iterations": "64",
    "sharpness.method": '"antithetic"',
    "sharpness.rho": "0.1",
    "sharpness.group_size": "8",
    "sharpness.min_draws": "2",
    "sharpness.max_draws": "4",
    "sharpness.target_relative_stderr": "0.05",
    "resources.batch_size": "32",
}
DETERMINING = {
    "seed": "1",
    "output": '"identity"',
    "dtype": '"float64"',
    "data.split": '"val"',
    "data.root": '"others"',
}
OF_SENSITIVITY = {
    "mls.method": '"dense"',
    "mls.tolerance": "1e-2",
    "mls.failure_probability": "1e-6",
    "mls.max_iterations": "32",
}
OF_SHARPNESS = {
    "sharpness.method": '"one_sided"',
    "sharpness.rho": "0.2",
    "sharpness.group_size": "4",
}
IRRELEVANT = {
    "name": '"another"',
    "data.samples": "3",
    "family": '"two"',
    "mls.label": '"x"',
    "sharpness.label": '"x"',
    "sharpness.min_draws": "3",
    "sharpness.max_draws": "64",
    "sharpness.max_samples": "5",
    "sharpness.target_relative_stderr": "0.01",
    "resources.batch_size": "4",
    "resources.num_cpus": "2",
    "resources.unit_seconds": "1.0",
    "resources.max_slots": "1",
    "resources.max_attempts": "1",
    "resources.hang_seconds": "9.0",
    "resources.num_gpus": "1.0",
}
MEASURES = ("normalized_mls", "adaptive_sharpness")


def manifest_text(values: dict[str, Any]) -> str:
    def table(prefix: str) -> str:
        keys = [key for key in values if key.startswith(prefix + ".")]
        return "\n".join(f"{key.removeprefix(prefix + '.')} = {values[key]}" for key in keys)

    top = "\n".join(f"{key} = {values[key]}" for key in ("name", "seed", "output", "dtype"))
    return (
        f"{top}\n[data]\n{table('data')}\n[resources]\n{table('resources')}\n"
        f'[[checkpoints]]\nsource = "local"\npaths = {values["paths"]}\nfamily = {values["family"]}'
        f'\n[[measurements]]\nmetric = "normalized_mls"\n{table("mls")}\n'
        f'[[measurements]]\nmetric = "adaptive_sharpness"\n{table("sharpness")}\n'
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder of checkpoints and images; tests that change files copy it."""
    return build(tmp_path_factory.mktemp("keys"))


def build(folder: Path) -> Path:
    save_mlp(folder / "checkpoints/a", label_names=FOLDER_CLASSES)
    rng = np.random.default_rng(0)
    for place in ("images/test", "images/val", "others/test"):
        for index in range(5):
            path = folder / place / f"class{index % 2}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return folder


def keys(folder: Path, **changes: str) -> dict[str, str]:
    """Key of each measurement of the only checkpoint."""
    text = manifest_text(BASE | changes)
    manifest = parse_manifest(text, where="m.toml", root=folder)
    found = resolve(manifest, open_store(folder / "run"))
    assert not found.unresolved
    return {spec.metric: spec.key for spec in found.specs}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in MEASURES if before[name] != after[name]}


@pytest.mark.parametrize("name", DETERMINING)
def test_what_all_measurements_depend_on_is_in_every_key(original: Path, name: str):
    after = keys(original, **{name: DETERMINING[name]})
    assert changed(keys(original), after) == set(MEASURES)


@pytest.mark.parametrize("name", OF_SENSITIVITY | OF_SHARPNESS)
def test_settings_of_one_measurement_are_in_its_key_alone(original: Path, name: str):
    after = keys(original, **{name: (OF_SENSITIVITY | OF_SHARPNESS)[name]})
    owner = "normalized_mls" if name in OF_SENSITIVITY else "adaptive_sharpness"
    assert changed(keys(original), after) == {owner}


def test_every_setting_is_tested_as_determining_or_not():
    tested = OF_SENSITIVITY | OF_SHARPNESS | IRRELEVANT
    for prefix, measurement in (("mls", NormalizedMls), ("sharpness", AdaptiveSharpness)):
        assert {f"{prefix}.{name}" for name in measurement.model_fields} <= set(tested)


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_cannot_change_a_number_is_in_no_key(original: Path, name: str):
    assert keys(original, **{name: IRRELEVANT[name]}) == keys(original)


def test_defaults_and_the_same_values_written_out_have_one_key(original: Path):
    bare = {k: v for k, v in BASE.items() if not k.startswith(("mls.", "sharpness."))}
    manifest = parse_manifest(manifest_text(bare), where="m.toml", root=original)
    found = resolve(manifest, open_store(original / "run")).specs
    assert {spec.metric: spec.key for spec in found} == keys(original)


@pytest.mark.parametrize("measurement", [NormalizedMls, AdaptiveSharpness])
def test_a_new_version_of_a_measurement_is_in_its_key_alone(
    original: Path, measurement, monkeypatch: pytest.MonkeyPatch
):
    before = keys(original)
    monkeypatch.setattr(measurement, "version", measurement.version + 1)
    assert changed(before, keys(original)) == {measurement.metric}


def test_the_meaning_of_keys_has_a_version(original: Path, monkeypatch: pytest.MonkeyPatch):
    before = keys(original)
    monkeypatch.setattr(pipeline.resolve, "KEY_VERSION", pipeline.resolve.KEY_VERSION + 1)
    assert changed(before, keys(original)) == set(MEASURES)


def set_weight(folder: Path) -> None:
    path = folder / "checkpoints/a/model.safetensors"
    state = load_file(path)
    state["1.weight"][0, 0] += 1e-6
    save_file(state, path)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "checkpoints/a/config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def transform_field(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda c: c["pretrained_cfg"].update({name: value}))


def set_pixel(folder: Path) -> None:
    path = folder / "images/test/class0/0.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def swap_labels(folder: Path) -> None:
    root = folder / "images/test"
    (root / "class0/0.png").rename(root / "class1/0.png")


FILES: dict[str, Callable[[Path], object]] = {
    "a weight": set_weight,
    "an argument of the network": lambda f: edit_config(
        f, lambda c: c["model_args"].update(activation="relu")
    ),
    "mean": transform_field("mean", [0.4]),
    "std": transform_field("std", [0.4]),
    "interpolation": transform_field("interpolation", "bilinear"),
    "crop_pct": transform_field("crop_pct", 0.875),
    "crop_mode": transform_field("crop_mode", "squash"),
    "a pixel": set_pixel,
    "a label": swap_labels,
    "an image less": lambda f: (f / "images/test/class0/4.png").unlink(),
    "a class name": lambda f: (f / "images/test/class1").rename(f / "images/test/class2"),
}


@pytest.mark.parametrize("what", FILES)
def test_contents_are_in_every_key(tmp_path: Path, what: str):
    before = keys(build(tmp_path))
    FILES[what](tmp_path)
    assert changed(before, keys(tmp_path)) == set(MEASURES)


@pytest.mark.parametrize(
    "field", ["input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"]
)
def test_fields_of_the_transform_are_in_the_key_by_themselves(original: Path, field: str):
    """A checkpoint's identity holds its config; a hub checkpoint's transform is timm's alone."""
    manifest = parse_manifest(manifest_text(BASE), where="m.toml", root=original)
    (spec, _) = resolve(manifest, open_store(original / "run")).specs
    assert spec.key == spec_key(spec.fields)
    for part in ("checkpoint", "data", "output", "dtype", "seed", "kind", "key_version"):
        assert spec_key(spec.fields | {part: "x"}) != spec.key
    assert spec_key(spec.fields | {"transform": spec.fields["transform"] | {field: 0}}) != spec.key


def test_where_a_checkpoint_lies_and_how_it_is_called_is_in_no_key(tmp_path: Path):
    before = keys(build(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints/a").rename(tmp_path / "elsewhere/renamed")
    assert keys(tmp_path, paths='["elsewhere/*"]') == before


def test_where_the_images_and_the_results_lie_is_in_no_key(tmp_path: Path):
    before = keys(build(tmp_path / "one"))
    assert keys(build(tmp_path / "two")) == before
    (tmp_path / "one/images").rename(tmp_path / "one/pictures")
    assert keys(tmp_path / "one", **{"data.root": '"pictures"'}) == before


def test_keys_are_96_bits_and_do_not_depend_on_the_order_of_fields():
    fields = {"a": 1, "b": {"c": 2.5, "d": "é"}}
    again = {"b": {"d": "é", "c": 2.5}, "a": 1}
    assert spec_key(fields) == spec_key(again)
    assert len(spec_key(fields)) == 24
    assert int(spec_key(fields), 16) >= 0
    with pytest.raises(ValueError, match="not JSON compliant"):
        spec_key({"a": float("nan")})


TRAINING = {
    "network": '"mlp"', "width": "8", "depth": "1", "activation": '"tanh"', "loss": '"mse"',
    "optimizer": '"adamw"', "learning_rate": "0.01", "weight_decay": "0.1", "momentum": "0.5",
    "schedule": '"cosine"', "warmup_steps": "3", "batch_size": "16", "steps": "50",
    "train_samples": "30", "eval_every": "10", "eval_samples": "5", "seed": "1",
}  # fmt: skip


def training_key(**changes: str) -> str:
    table = {"network": '"mlp"', "name": '"n"', "steps": "20"} | changes
    text = 'name = "t"\n[data]\nname = "digits"\n[[train]]\n' + "\n".join(
        f"{key} = {value}" for key, value in table.items()
    )
    manifest = parse_manifest(text, where="m.toml", root=Path("/nowhere"))
    (spec,) = resolve(manifest, open_store("/nowhere/run")).specs
    return spec.key


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "network"])
def test_every_setting_of_a_training_is_in_its_key(name: str):
    assert training_key(**{name: TRAINING[name]}) != training_key()


def test_no_setting_of_a_training_is_forgotten():
    of_vit = {"heads", "patch_size", "mlp_ratio", "dropout"}
    of_timm = {"architecture", "img_size", "model_args"}
    assert set(TrainSettings.model_fields) == set(TRAINING) | of_vit | of_timm
    assert len({training_key(network='"vit"', patch_size=p) for p in ("2", "4")}) == 2
    plain = {"network": '"timm"', "architecture": '"levit_128s"'}
    changes = [
        {}, {"architecture": '"levit_128"'}, {"img_size": "64"}, {"model_args": "{depth=[1,2,3]}"},
    ]  # fmt: skip
    assert len({training_key(**plain | {"img_size": "32"} | c) for c in changes}) == 4


def test_a_trained_checkpoints_name_and_family_are_in_no_key():
    assert training_key(name='"other"', family='"x"') == training_key()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A hub whose main branch points to ``commit``; it answers for every commit."""
    state = {"commit": "1" * 40}

    def answer(name: str, *, revision: str | None = None) -> HubFile:
        return HubFile("timm/x", revision or state["commit"], "model.safetensors", None, None)

    monkeypatch.setattr("pipeline.hub.resolve", answer)
    return state


def hub_commits(store: Store, extra: str = "") -> set[str]:
    text = (
        'name = "h"\n[data]\nname = "digits"\n[[checkpoints]]\nsource = "timm"\n'
        f'names = ["vit_tiny_patch16_224"]\n{extra}[[measurements]]\nmetric = "normalized_mls"\n'
    )
    found = resolve(parse_manifest(text, where="m.toml", root=Path("/nowhere")), store)
    keep(found.files, store)
    return {spec.fields["checkpoint"] for spec in found.specs}


def test_a_run_keeps_the_commit_it_first_saw(tmp_path: Path, hub: dict[str, str]):
    store = open_store(tmp_path / "run")
    first = hub_commits(store)
    hub["commit"] = "2" * 40
    assert hub_commits(store) == first
    assert hub_commits(open_store(tmp_path / "new")) != first
    (key,) = json.loads(store.get(LOCK))["files"]
    assert key == "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_a_run_folder_of_an_earlier_version_keeps_its_commit(tmp_path: Path, hub: dict[str, str]):
    store = open_store(tmp_path / "run")
    known = {"vit_tiny_patch16_224.augreg_in21k_ft_in1k": "3" * 40}
    store.put(LOCK, json.dumps(known).encode())
    assert "3" * 40 in hub_commits(store).pop()
    hub["commit"] = "4" * 40
    assert "3" * 40 in hub_commits(store).pop(), "now from the full record"
    assert "commits" not in json.loads(store.get(LOCK))


def test_a_revision_in_the_manifest_goes_before_the_lock(tmp_path: Path, hub: dict[str, str]):
    store = open_store(tmp_path / "run")
    first = hub_commits(store)
    pinned = hub_commits(store, f'revision = "{"3" * 40}"\n')
    assert pinned != first
    assert "3" * 40 in pinned.pop()


def test_two_architectures_of_one_weights_file_have_keys_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """timm's CLIP networks: the same weights, with GELU or with its approximation."""
    names = ["vit_base_patch32_clip_224.openai", "vit_base_patch32_clip_quickgelu_224.openai"]
    file = HubFile(f"timm/{names[0]}", "1" * 40, "open_clip_model.safetensors", None, None)
    monkeypatch.setattr("pipeline.hub.resolve", lambda name, *, revision=None: file)
    text = (
        'name = "h"\n[data]\nname = "digits"\n[[checkpoints]]\nsource = "timm"\n'
        f'names = {names}\n[[measurements]]\nmetric = "normalized_mls"\n'
    )
    store = open_store(tmp_path / "run")
    specs = resolve(parse_manifest(text, where="m.toml", root=Path("/nowhere")), store).specs
    assert len({spec.fields["checkpoint"] for spec in specs}) == 1
    assert len({spec.key for spec in specs}) == 2
    assert len({spec.subject for spec in specs}) == 2, "a worker must not keep the other's network"
    assert "architecture" not in specs[0].fields, "the repository's name says it: keys stay"


PROVENANCE = {
    "samples", "batch_size", "threads", "device", "attempt", "generation", "store",
    "predicted_seconds", "predicted_bytes", "bisected",
}  # fmt: skip


def test_at_least_twenty_inputs_of_a_number_are_mutated_one_by_one():
    """The tests above change each of these alone, and see the key change."""
    inputs = [*DETERMINING, *OF_SENSITIVITY, *OF_SHARPNESS, *FILES]
    assert len(set(inputs)) == len(inputs) >= 20
    assert len(TRAINING) - 1 >= 15, "and those of a training"


def test_what_a_unit_is_given_besides_its_spec_is_in_no_key(original: Path):
    """A key is a function of ``fields`` alone, and these hold nothing of how the work is done."""
    manifest = parse_manifest(manifest_text(BASE), where="m.toml", root=original)
    specs = resolve(manifest, open_store(original / "run")).specs
    given = {field.name for field in dataclasses.fields(Task)} - {"spec", "block", "seed"}
    assert given <= PROVENANCE, "decide whether the new field determines numbers"
    for spec in specs:
        named = {name for name, _ in nested(spec.fields)}
        assert not named & PROVENANCE, "a key must not depend on how the work is done"
        assert spec.key == spec_key(json.loads(json.dumps(spec.fields)))
        for name, changed_fields in nested(spec.fields):
            assert spec_key(changed_fields) != spec.key, f"{name} has no part in the key"


def nested(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of every field at any depth, and the fields with that one changed."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((inner, fields | {name: other}) for inner, other in nested(value))
        yield name, fields | {name: "changed"}
