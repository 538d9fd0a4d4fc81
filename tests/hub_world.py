"""A census of pretrained timm models in small: a fake hub, images, a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fake_hub import FakeHub, fake_hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save

# Networks of timm's own tests, 0.4 M parameters each, under the names of their repositories.
NAMES = ("test_vit.r160_in1k", "test_vit3.r160_in1k", "test_convnext.r160_in1k")
WEIGHTS = "model.safetensors"
TOKEN = "hf_" + "Sentinel" * 4


@cache
def weights(name: str) -> bytes:
    """Random weights of a model, as a safetensors file."""
    torch.manual_seed(len(name))
    return save(timm.create_model(name.partition(".")[0]).state_dict())


@contextmanager
def served(*names: str) -> Iterator[FakeHub]:
    """A hub that has these models, all under one commit."""
    with fake_hub({f"timm/{name}": {WEIGHTS: weights(name)} for name in names}) as hub:
        yield hub


def point(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process use the hub, with its cache in a folder, and a token."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def environment(hub: FakeHub, folder: Path, **more: str) -> dict[str, str]:
    """The same for other processes."""
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip


def write_census(
    path: Path, *names: str, revision: str = "", samples: int = 2, resources: str = ""
) -> Path:
    """A manifest of pretrained models on a few images, which it makes too."""
    for number in range(4):
        place = path.parent / "images" / "n01440764" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(place)
    pinned = f'revision = "{revision}"\n' if revision else ""
    path.write_text(
        f'name = "{path.stem}"\n'
        f'[data]\nname = "image-folder"\nroot = "images"\nsamples = {samples}\n'
        f'[[checkpoints]]\nsource = "timm"\nnames = {list(names)!r}\n{pinned}'
        '[[measurements]]\nmetric = "normalized_mls"\nmethod = "power"\nmax_iterations = 2\n'
        f"[resources]\nbatch_size = 2\n{resources}\n"
    )
    return path
