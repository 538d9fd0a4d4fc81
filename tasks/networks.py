"""The small networks that the paper trains, layer by layer, and those of timm.

Sizes and initialisations are those of the authors' code for arXiv 2310.01770: an MLP with three
hidden layers of 500, LeNet in its CIFAR and Fashion-MNIST variants, and a five-layer "VGG-11".
None has batch norm or dropout. The names carry a prefix because timm has a ``vgg11`` of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm
import torch
from torch import nn

Activation = Literal["relu", "tanh"]
VIT_ARCHITECTURE = "vit_tiny_patch16_224"  # only its class matters: vit() sets every size


def build_network(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build one of ``NETWORKS`` with fresh weights from torch's global generator.

    Args:
        architecture: A key of ``NETWORKS``.
        model_args: Keyword arguments of that network.

    Returns:
        Network from (B, C, H, W) to logits (B, num_classes), with attribute ``num_classes``.

    Raises:
        ValueError: If the arguments do not fit the network.
    """
    try:
        network = NETWORKS[architecture](**model_args)
    except TypeError as error:
        raise ValueError(f"{architecture} does not take these model_args: {error}") from error
    network.num_classes = model_args["num_classes"]
    return network


def mlp(
    *,
    in_chans: int,
    img_size: int,
    num_classes: int,
    width: int = 500,
    depth: int = 3,
    activation: Activation = "relu",
) -> nn.Sequential:
    """Fully connected network on the flattened image, PyTorch's default initialisation.

    Args:
        in_chans: Channels of the image.
        img_size: Height and width of the image.
        num_classes: Number of logits.
        width: Size of each hidden layer. 500 in the paper.
        depth: Number of hidden layers. 3 in the paper.
        activation: ``"relu"`` in the paper's correlation runs, ``"tanh"`` in its training curves.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    size = in_chans * img_size**2
    for _ in range(depth):
        layers += [nn.Linear(size, width), nn.ReLU() if activation == "relu" else nn.Tanh()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, num_classes))


def lenet(*, in_chans: int, img_size: int, num_classes: int) -> nn.Sequential:
    """LeNet: two convolutions of 5×5 with pooling, then linear layers 120, 84, ``num_classes``.

    Images below 32 pixels are padded by 2 in the first convolution (the Fashion-MNIST variant).
    The three-channel variant (CIFAR) starts from Xavier-normal weights and zero biases.

    Raises:
        ValueError: If the image is too small for two convolutions.
    """
    padding = 2 if img_size < 32 else 0
    side = ((img_size + 2 * padding - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"lenet needs images of at least 12 pixels, found {img_size}")
    network = nn.Sequential(
        *(nn.Conv2d(in_chans, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, num_classes),
    )
    if in_chans == 3:
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(_bias(layer))
    return network


def vgg11(*, in_chans: int, img_size: int, num_classes: int) -> nn.Sequential:
    """Five convolutions of 3×3 with padding 2 and pooling, then linear layers 128, ``num_classes``.

    Convolutions start from N(0, 2 / (9 C_out)) with zero biases, as in the authors' code.
    """
    layers: list[nn.Module] = []
    channels, side = in_chans, img_size
    for width in (16, 16, 32, 64, 64):
        conv = nn.Conv2d(channels, width, 3, padding=2)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * width)))
        nn.init.zeros_(_bias(conv))
        layers += [conv, nn.ReLU(), nn.MaxPool2d(2)]
        channels, side = width, (side + 2) // 2
    size = channels * side**2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, num_classes)
    )


def vit(
    *,
    in_chans: int,
    img_size: int,
    num_classes: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    dropout: float = 0.0,
) -> tuple[str, dict[str, Any]]:
    """Describe a small timm ``VisionTransformer``.

    Args:
        in_chans: Channels of the image.
        img_size: Height and width of the image, a multiple of ``patch_size``.
        num_classes: Number of logits.
        patch_size: Height and width of a patch.
        width: Embedding dimension, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads of each block.
        mlp_ratio: Hidden size of each block's MLP, in units of ``width``.
        dropout: Probability of dropping a position embedding or projection output in training.

    Returns:
        timm architecture and its ``model_args``.

    Raises:
        ValueError: If the sizes do not divide.
    """
    if img_size % patch_size:
        raise ValueError(f"patch_size = {patch_size} does not divide the image size {img_size}")
    if width % heads:
        raise ValueError(f"heads = {heads} does not divide width = {width}")
    model_args = {
        "img_size": img_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": num_classes,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "pos_drop_rate": dropout,
        "proj_drop_rate": dropout,
    }
    return VIT_ARCHITECTURE, model_args


def timm_network(
    architecture: str, sizes: Mapping[str, int], model_args: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Describe an architecture of timm for images of these sizes.

    Args:
        architecture: timm's name, without a tag.
        sizes: ``in_chans``, ``img_size`` and ``num_classes``. Architectures that take images of any
            size know no ``img_size``; for them it is left out.
        model_args: Further arguments of the architecture; they win over ``sizes``.

    Returns:
        timm architecture and its ``model_args``.

    Raises:
        Exception: Whatever the constructor raises for arguments that do not fit it.
    """
    arguments = {**sizes, **model_args}
    try:
        with torch.device("meta"):
            timm.create_model(architecture, **arguments)
    except TypeError as error:
        if "img_size" not in str(error) or "img_size" in model_args:
            raise
        del arguments["img_size"]
    return architecture, arguments


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "flatcensus_mlp": mlp,
    "flatcensus_lenet": lenet,
    "flatcensus_vgg11": vgg11,
}


def _bias(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    assert layer.bias is not None
    return layer.bias
