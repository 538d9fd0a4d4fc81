"""A network with other values in the place of its parameters, for one forward at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def replaced(model: nn.Module, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """A view of a network in which some parameters, by name, have other values.

    A parameter that several modules share has them in all of them.
    """
    first: dict[int, str] = {}
    by_name: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            shared = first.setdefault(id(parameter), name)
            if shared in values:
                by_name[name] = values[shared]
    return _Replaced(model, by_name)


class _Replaced(nn.Module):
    def __init__(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.model, self.values = [model], values  # in a list: not a submodule

    def forward(self, images: torch.Tensor) -> Any:
        # torch would look for shared parameters by name and leave its own values in a module that
        # stands in the network under two names.
        return functional_call(self.model[0], self.values, (images,), tie_weights=False)
