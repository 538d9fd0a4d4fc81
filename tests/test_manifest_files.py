"""The manifests that come with the repository are valid and train what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

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
