"""The networks to measure, the same for every benchmark: three of a run, or three trained here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tasks.checkpoints import describe_local, load_checkpoint, save_checkpoint
from tasks.datasets import preprocessing
from tasks.images import DatasetError, load_dataset
from tasks.training import train
from tasks.training_settings import TrainSettings

TRAINED_SIZES = ((32, 2), (48, 3), (64, 4))  # width and depth: within those of the paper's figure


@dataclass(frozen=True)
class Network:
    """A trained network with test images in the form that it takes, and their labels."""

    name: str
    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor


def checkpoints_of(run: Path) -> list[Path]:
    """First, middle and last checkpoint of a run folder by name; none if there is no run."""
    found = sorted(path.parent for path in run.glob("checkpoints/*/config.json"))
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})] if found else []


def trained_checkpoints(folder: Path, dataset: str, *, steps: int = 400) -> list[Path]:
    """Train three small vision transformers, in a few seconds each, and save them."""
    train_set, test_set = (load_dataset(dataset, split=split) for split in ("train", "test"))
    paths = []
    for width, depth in TRAINED_SIZES:
        settings = TrainSettings(
            network="vit", width=width, depth=depth, heads=4 if width % 4 == 0 else 3,
            patch_size=7 if dataset == "fashion-mnist" else 2, optimizer="adamw",
            learning_rate=2e-3, weight_decay=0.05, schedule="cosine", warmup_steps=steps // 10,
            steps=steps, train_samples=min(6000, len(train_set)), eval_every=0,
        )  # fmt: skip
        trained = train(settings, train_set, test_set)
        paths.append(folder / f"vit{width}x{depth}")
        save_checkpoint(
            trained.model, paths[-1], architecture=trained.architecture,
            model_args=trained.model_args, data_config=trained.data_config, family="vit",
        )  # fmt: skip
    return paths


def load(path: Path, dataset: str, *, num_images: int) -> Network:
    """Load a checkpoint folder and the first test images."""
    loaded = load_checkpoint(describe_local(path))
    test_set = load_dataset(dataset, split="test")
    transform = preprocessing(loaded.data_config)
    indices = range(min(num_images, len(test_set)))
    return Network(
        name=name_of(path),
        model=loaded.model,
        images=torch.stack([transform(test_set.image(i)) for i in indices]),
        labels=torch.tensor([test_set.label(i) for i in indices]),
    )


def default_dataset() -> str:
    """Fashion-MNIST where it is installed, else digits."""
    try:
        load_dataset("fashion-mnist", split="test")
    except DatasetError:
        return "digits"
    return "fashion-mnist"


def name_of(path: Path) -> str:
    """Folders of trained checkpoints are named by digests: say how large the network is, too."""
    arguments = json.loads((path / "config.json").read_bytes()).get("model_args", {})
    width, depth, patch = (arguments.get(key) for key in ("embed_dim", "depth", "patch_size"))
    return f"{path.name[:8]} {width}x{depth}/{patch}" if width and depth else path.name
