"""The layers of a network: its calls of linear and convolutional modules, in order.

A *layer* is one call of an ``nn.Linear`` or ``nn.Conv2d`` module whose input depends on the image:
z = W x (+ b), W applied at each of its positions (tokens or patches).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tasks.jacobian import forward
from tasks.plain_layers import is_plain


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a linear or convolutional module.

    Attributes:
        name: The module's name; ``name#2`` for its second call on an image.
        module: The module.
        call: Which of the module's calls on an image, from 1.
        input_shape: Of one image's input, with the leading dimension that the module sees: (1, d),
            (1, T, d), (windows, T, d) or (1, C, H, W).
        output_shape: Of one image's output, likewise.
        owns_parameters: Whether the module's weight and bias act through this call alone, so that
            their gradient follows from the layer's input and the gradient at its output.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    call: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    owns_parameters: bool

    @property
    def positions(self) -> int:
        """How often the weight is applied to one image: tokens or patches."""
        size = 1
        for length in self.output_shape:
            size *= length
        return size // self.output_shape[1 if isinstance(self.module, nn.Conv2d) else -1]


def find_layers(model: nn.Module, image: torch.Tensor) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Linear and convolutional calls of a network, in order, and those on constant inputs.

    Args:
        model: In eval mode, parameters frozen.
        image: (1, C, H, W).
    """
    modules = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    found: list[Layer] = []
    constant: list[str] = []
    calls: Counter[nn.Module] = Counter()

    def hook(module: Any, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        calls[module] += 1
        name, call = modules[module], calls[module]
        if not args or not args[0].requires_grad:
            constant.append(name)
            return
        name = name if call == 1 else f"{name}#{call}"
        shapes = tuple(args[0].shape), tuple(result.shape)
        found.append(Layer(name, module, call, *shapes, owns_parameters=is_plain(module)))

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        with torch.enable_grad():
            forward(model, image.detach().clone().requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    sole = {
        module
        for module, count in calls.items()
        if count == 1 and all(holders[id(p)] == 1 for p in module.parameters())
    }
    layers = [
        replace(layer, owns_parameters=layer.owns_parameters and layer.module in sole)
        for layer in found
    ]
    return tuple(layers), tuple(dict.fromkeys(constant))
