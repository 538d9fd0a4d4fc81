"""The manifests that come with the repository are valid and train what they say."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import timm

from pipeline.entries import TimmModel
from pipeline.manifest import load_manifest

MANIFESTS = Path(__file__).parents[1] / "manifests"


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_manifest_is_valid_and_in_the_reference(path: Path):
    manifest = load_manifest(path)
    assert manifest.name == path.stem
    assert f"[`{path.name}`]({path.name})" in (MANIFESTS / "README.md").read_text()


def test_fashion_classics_trains_the_papers_networks_at_the_papers_settings():
    manifest = load_manifest(MANIFESTS / "fashion-classics.toml")
    settings = [entry.settings for entry in manifest.train]
    assert Counter(s.network for s in settings) == {"mlp": 15, "lenet": 12}
    assert {(s.batch_size, s.learning_rate) for s in settings if s.network == "mlp"} == {
        (20, 0.05), (20, 0.1), (20, 0.2), (8, 0.1), (32, 0.1),
    }  # fmt: skip
    assert {(s.loss, s.optimizer, s.momentum, s.weight_decay, s.schedule) for s in settings} == {
        ("mse", "sgd", 0.0, 0.0, "constant")
    }
    assert {(s.width, s.depth, s.activation) for s in settings if s.network == "mlp"} == {
        (500, 3, "relu")
    }
    assert manifest.output == "identity"
    passes = [s.steps * s.batch_size / (s.train_samples or 60_000) for s in settings]
    assert (min(passes), max(passes)) == (160, 640)
    assert "160 to\n# 640 passes" in manifest.text


def test_fashion_families_trains_every_family_of_the_census_and_deit():
    manifest = load_manifest(MANIFESTS / "fashion-families.toml")
    found = Counter(entry.family for entry in manifest.train)
    assert set(found) == {m.family for m in models("timm-vits")} | {"deit"}
    assert min(found.values()) == 3


def test_the_papers_population_is_its_number_of_names_that_timm_still_builds_alike():
    paper = models("timm-vits-181")
    assert len({m.name for m in paper}) == len(paper) == 181
    now = {m.name: m for m in models("timm-vits")}
    assert [m for m in paper if now.get(m.name) != m] == []
    assert paper == sorted(paper, key=lambda m: (m.parameters, m.name))


def test_the_census_has_the_eligible_names_of_the_installed_timm():
    listed, found = {m.name for m in models("timm-vits")}, set(generator().eligible())
    assert (sorted(found - listed), sorted(listed - found)) == ([], []), (
        f"timm {timm.__version__} has other names (came, went) than manifests/timm-vits.toml. "
        "Make it again: python manifests/timm_vits.py"
    )
    header = (MANIFESTS / "timm-vits.toml").read_text().splitlines()[0]
    assert header.startswith(f"# All {len(listed)} pretrained")


def test_the_generator_describes_a_model_as_its_manifest_does():
    listed = {m.name: m for m in models("timm-vits")}
    for name in ("levit_128s.fb_dist_in1k", "vit_tiny_patch16_384.augreg_in21k_ft_in1k"):
        assert generator().describe(name)._asdict() == listed[name].model_dump()


def models(stem: str) -> list[TimmModel]:
    return [m for entry in load_manifest(MANIFESTS / f"{stem}.toml").timm for m in entry.models]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("timm_vits", MANIFESTS / "timm_vits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
