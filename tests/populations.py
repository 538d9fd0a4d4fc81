"""Small real checkpoints and manifests for tests of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tasks.checkpoint_folder import save_checkpoint
from tasks.networks import build_network

DATA_CONFIG = {
    "input_size": (1, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    "mean": (0.5,), "std": (0.5,),
}  # fmt: skip
MLP_ARGS = {
    "in_chans": 1, "img_size": 8, "num_classes": 10, "width": 12, "depth": 1, "activation": "tanh",
}  # fmt: skip


FOLDER_CLASSES = tuple(f"class{i}" for i in range(10))


def save_mlp(folder: Path, *, seed: int = 0, change=None, label_names: Sequence[str] = ()) -> Path:
    """An MLP for digits with random weights; ``change(model)`` may spoil it before it is saved."""
    torch.manual_seed(seed)
    model = build_network("flatcensus_mlp", MLP_ARGS)
    if change is not None:
        with torch.no_grad():
            change(model)
    save_checkpoint(
        model, folder, architecture="flatcensus_mlp", model_args=MLP_ARGS,
        data_config=DATA_CONFIG, family="mlp", label_names=label_names,
    )  # fmt: skip
    return folder


def write_manifest(
    path: Path,
    *,
    checkpoints: str = "checkpoints/*",
    samples: int = 24,
    measurements: str = '[[measurements]]\nmetric = "normalized_mls"\n',
    resources: str = "",
    extra: str = "",
) -> Path:
    """A manifest that audits local checkpoints beside it on digits."""
    path.write_text(
        f'name = "{path.stem}"\n'
        f'[data]\nname = "digits"\nsamples = {samples}\n'
        f'[[checkpoints]]\nsource = "local"\npaths = ["{checkpoints}"]\n'
        f"{measurements}\n[resources]\n{resources}\n{extra}\n"
    )
    return path


class Quiet:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int] = []

    def planned(self, plan, num_slots: int) -> None:
        self.rounds.append(len(plan.units))

    def ended(self, task, outcome, note: str) -> None:
        if note:
            self.notes.append(f"{task.name}: {note}")
