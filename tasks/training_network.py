"""Which network the settings of a training mean for given images, and whether it takes them."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from tasks.datasets import DatasetError, ImageDataset
from tasks.networks import build_network, timm_network, vit
from tasks.training_settings import TrainSettings


def network_for(
    settings: TrainSettings, train_set: ImageDataset
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, its arguments and data configuration that the settings mean for these images.

    Raises:
        DatasetError: If the network does not fit the images.
    """
    data_config = _data_config(settings, train_set)
    wanted = (
        settings.network, settings.network_args(), data_config["input_size"], train_set.num_classes
    )  # fmt: skip
    try:
        architecture, model_args = _fitting(json.dumps(wanted))
    # What constructors raise when sizes do not fit them or each other.
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name = settings.architecture or settings.network
        raise DatasetError(
            f"network {name!r} on the images of {train_set.name}: {error}"
        ) from error
    return architecture, copy.deepcopy(model_args), data_config


def build(architecture: str, model_args: dict[str, Any]) -> nn.Module:
    """Build a network with fresh weights from torch's global generator."""
    if architecture.startswith("flatcensus_"):
        return build_network(architecture, model_args)
    return timm.create_model(architecture, **model_args)


@cache
def _fitting(wanted: str) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a network that takes the images; a grid shares a few of them.

    Args:
        wanted: JSON of network, its settings, (channels, height, width), number of classes.
    """
    network, network_args, input_size, num_classes = json.loads(wanted)
    channels, size, _ = input_size
    sizes = {"in_chans": channels, "img_size": size, "num_classes": num_classes}
    architecture, model_args = _architecture(network, network_args, sizes)
    with torch.device("meta"):  # no memory and no random number: only the sizes are tried
        build(architecture, model_args).eval()(torch.empty(1, *input_size))
    return architecture, model_args


def _data_config(settings: TrainSettings, train_set: ImageDataset) -> dict[str, Any]:
    image = train_set.image(0)
    if image.width != image.height:
        raise DatasetError(
            f"{train_set.name}: training needs square images, found {image.width}×{image.height}"
        )
    channels = 1 if image.mode == "L" else 3
    # The paper's networks see pixels / 255; timm's values in [-1, 1], as most of them do.
    mean, std = (0.5, 0.5) if settings.network in ("vit", "timm") else (0.0, 1.0)
    size = settings.img_size or image.height
    return {
        "input_size": (channels, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": (mean,) * channels,
        "std": (std,) * channels,
    }


def _architecture(
    network: str, network_args: dict[str, Any], sizes: dict[str, int]
) -> tuple[str, dict[str, Any]]:
    if network == "vit":
        return vit(**sizes, **network_args)
    if network == "timm":
        return timm_network(network_args["architecture"], sizes, network_args["model_args"] or {})
    return f"flatcensus_{network}", sizes | network_args
