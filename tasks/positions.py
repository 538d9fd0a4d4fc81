"""What a layer's weight is applied to: one vector per position, tokens or patches.

For z_t = W p_t (+ b), t = 1 ... T, with g_t the gradient at z_t, the gradient of the weight is the
sum over t of g_t p_t^T. Contributions of positions can cancel in it, while the gradient at the
layer's input does not notice: that is why the paper's bounds need care where T > 1.

Shapes: G groups of channels (1 but for grouped convolutions), T positions of one image (windows
count), d and h the weight's input and output size per group.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tasks.convolution import zero_padding
from tasks.layers import Layer


def input_positions(layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """The vectors p_t of every image.

    Args:
        layer: One that owns its parameters.
        inputs: (B, *layer.input_shape).

    Returns:
        (B, G, T, d).
    """
    module = layer.module
    if isinstance(module, nn.Linear):
        return inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
    images = inputs.flatten(0, 1)
    rows, columns = (zero_padding(module, axis, images.shape[2 + axis]) for axis in (0, 1))
    padded = F.pad(images, (*columns, *rows))
    patches = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
    windows, groups = layer.input_shape[0], module.groups
    split = patches.reshape(len(inputs), windows, groups, -1, patches.shape[-1])
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3)


def output_positions(layer: Layer, gradients: torch.Tensor) -> torch.Tensor:
    """The gradients g_t in the order of ``input_positions``.

    Args:
        layer: One that owns its parameters.
        gradients: (..., *layer.output_shape).

    Returns:
        (..., G, T, h).
    """
    module = layer.module
    rank = len(layer.output_shape)
    lead = gradients.shape[: gradients.ndim - rank]
    if isinstance(module, nn.Linear):
        return gradients.reshape(*lead, 1, -1, gradients.shape[-1])
    windows, groups = layer.output_shape[0], module.groups
    channels = layer.output_shape[1] // groups
    split = gradients.flatten(-2).reshape(-1, windows, groups, channels, layer.positions // windows)
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3).unflatten(0, lead)
