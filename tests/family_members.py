"""Small members of every family: random weights that leave nothing dead, real photographs."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from tasks.checkpoint_folder import save_checkpoint
from tasks.datasets import preprocessing
from tasks.families import MEMBERS, Member

NAMES = [f"{member.family}-{member.architecture}" for member in MEMBERS]


def data_config(member: Member) -> dict[str, object]:
    """The transform of timm's vision transformers, at the member's size."""
    return {
        "input_size": (3, member.pixels, member.pixels), "interpolation": "bicubic",
        "crop_pct": 0.9, "crop_mode": "center", "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }  # fmt: skip


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Four photographs that come with scikit-learn and scikit-image."""
    arrays = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.chelsea()]
    return tuple(Image.fromarray(np.asarray(array)) for array in arrays)


def images(member: Member) -> torch.Tensor:
    """The photographs as the member takes them, (4, 3, H, W)."""
    transform = preprocessing(data_config(member))
    return torch.stack([transform(photo) for photo in photographs()])


def build(member: Member, *, outputs: int = 10) -> nn.Module:
    """The member in eval mode with weights such that every part of it matters.

    timm starts layer scales and gates near zero, norms as the identity, weights so small that a
    transformer is nearly its head, and batch norms from statistics that no image ever had. Here
    scales are drawn between 0.5 and 1.5, weights at the size that keeps a signal's, what else is
    constant gets noise, and batch statistics are those of the photographs, then moved.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(member.architecture, num_classes=outputs, **member.model_args)
        with torch.no_grad():
            for parameter in model.parameters():
                if float(parameter.max() - parameter.min()) > 1e-6 or parameter.ndim == 0:
                    continue
                if float(parameter.abs().max()) > 0:  # scales of norms and layers
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0, 0.1)
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.weight.normal_(0, module.weight[0].numel() ** -0.5)
        _calibrate(model.eval(), images(member))
    return model


def _calibrate(model: nn.Module, photos: torch.Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(photos)
        for norm in norms:
            norm.eval()
            norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
            norm.running_var.clamp_(min=1e-2).mul_(
                torch.empty_like(norm.running_var).uniform_(0.5, 2)
            )


def save(member: Member, folder: Path, *, outputs: int = 10) -> Path:
    """The member as a checkpoint folder."""
    save_checkpoint(
        build(member, outputs=outputs), folder, architecture=member.architecture,
        model_args={**member.model_args, "num_classes": outputs},
        data_config=data_config(member), family=member.family,
    )  # fmt: skip
    return folder
