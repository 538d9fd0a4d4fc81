"""``models`` of a manifest: names with what is known of them, which timm must agree with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.errors import HubError, ManifestError
from pipeline.hub_file import HubFile
from pipeline.lock import Lock, lock_path, timm_key, write_lock
from pipeline.manifest import load_manifest
from pipeline.resolve import resolve
from pipeline.run import start_run
from pipeline.store import open_store

NAME = "test_vit.r160_in1k"
KNOWN = f'name = "{NAME}", tag = "r160_in1k", input_size = 160'
HEAD = """name = "m"
[data]
name = "digits"
labels = "ignore"
samples = 4
[[measurements]]
metric = "normalized_mls"
[[checkpoints]]
source = "timm"
"""


def write(folder: Path, models: str) -> Path:
    """A manifest whose only weights are locked, so that nobody is asked for them."""
    path = folder / "m.toml"
    path.write_text(f"{HEAD}models = [{models}]\n")
    file = HubFile(f"timm/{NAME}", "a" * 40, "model.safetensors", 1, "b" * 64)
    write_lock(lock_path(path), Lock({timm_key(NAME, None): (file,)}))
    return path


def test_models_are_names_with_a_family_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, f'{{ {KNOWN}, family = "mine" }}')
    (entry,) = load_manifest(path).timm
    assert entry.names == [NAME]
    resolved = resolve(load_manifest(path), open_store(str(tmp_path / "run")))
    assert not resolved.unresolved
    assert [spec.family for spec in resolved.specs] == ["mine"]
    path = write(tmp_path, f"{{ {KNOWN} }}")
    resolved = resolve(load_manifest(path), open_store(str(tmp_path / "run")))
    assert [spec.family for spec in resolved.specs] == ["vision_transformer"]


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (f'name = "{NAME}", parameters = 5', "parameters [0-9]+ instead of 5"),
        (f'name = "{NAME}", input_size = 224', "input_size 160 instead of 224"),
    ],
)
def test_a_network_that_timm_builds_otherwise_is_a_failure_by_name(
    wrong: str, found: str, tmp_path: Path
) -> None:
    manifest = load_manifest(write(tmp_path, f"{{ {wrong} }}"))
    resolved = resolve(manifest, open_store(str(tmp_path / "run")))
    assert not resolved.specs
    (missing,) = resolved.unresolved
    assert missing.checkpoint == NAME
    assert re.search(found, missing.reason)


def test_a_commit_that_leaves_the_weights_as_they_are_makes_nothing_stale(tmp_path: Path) -> None:
    path = write(tmp_path, f"{{ {KNOWN} }}")
    store = open_store(str(tmp_path / "run"))

    def key(commit: str, sha256: str | None) -> str:
        file = HubFile(f"timm/{NAME}", commit * 40, "model.safetensors", 1, sha256)
        write_lock(lock_path(path), Lock({timm_key(NAME, None): (file,)}))
        (spec,) = resolve(load_manifest(path), store).specs
        assert spec.ref is not None
        assert commit * 40 in spec.ref.identity, "it is fetched at its commit all the same"
        return spec.key

    assert key("a", "b" * 64) == key("c", "b" * 64)
    assert key("a", "b" * 64) != key("a", "d" * 64)
    assert key("a", None) != key("c", None), "nothing but the commit tells what is in the file"


def test_a_plan_takes_images_on_trust_that_the_hub_cannot_be_asked_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, f'{{ {KNOWN} }}, {{ name = "levit_128s.fb_dist_in1k" }}')
    on_hub = 'name = "hub"\nrepo = "ILSVRC/imagenet-1k"\nsplit = "train"'
    path.write_text(path.read_text().replace('name = "digits"', on_hub))
    run = start_run(path, str(tmp_path / "run"))
    plan = run.plan()
    assert not plan.unresolved
    notes = {item.spec.checkpoint: item.spec.note for item in plan.specs}
    assert notes[NAME].startswith("images unknown: ILSVRC/imagenet-1k: ")
    assert "HF_HUB_OFFLINE is set" in notes[NAME]
    assert notes["levit_128s.fb_dist_in1k"].startswith("weights not locked")
    assert sum(len(unit.block.samples) for unit in plan.units) == 8
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        resolve(run.manifest, run.store)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (f'{{ name = "{NAME}", tag = "in1k" }}', r"tag 'in1k' is not the tag of"),
        ('{ name = "test_vit" }', "full name with its tag, found 'test_vit'"),
        (f'{{ name = "{NAME}", paramters = 5 }}', "unknown key 'paramters'"),
        ('{ tag = "r160_in1k" }', "'models.0.name' is required"),
        ("3", "models"),
        ('{ name = "test_vti.r160_in1k" }', "no pretrained model 'test_vti.r160_in1k'. Did you"),
        ("", "names"),
    ],
)
def test_models_that_make_no_sense_are_refused_with_their_line(
    models: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=message) as error:
        load_manifest(write(tmp_path, models))
    assert "m.toml:" in str(error.value)
