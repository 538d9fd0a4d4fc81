"""Which traits of tasks/families.py a network has, found in the network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.autograd_graph import nodes
from tasks.jacobian import forward
from tasks.layers import find_layers
from tasks.plain_layers import is_plain
from tasks.precision import shortest_dtype
from tasks.preparation import prepare

_KINKS = ("Relu", "Hardswish", "Hardsigmoid", "Hardtanh", "Clamp", "MaxPool")


def found_traits(fresh: nn.Module, image: torch.Tensor) -> set[str]:
    """Names of the traits of a network as timm builds it, for an image (1, C, H, W)."""
    modules = list(fresh.modules())
    prepared = prepare(copy.deepcopy(fresh)).double()
    leaf = image.double().requires_grad_()
    with _InPlace() as in_place:
        logits = forward(prepared, leaf.clone())
    names = {node.name() for node in nodes(logits)}
    moving = copy.deepcopy(prepared).requires_grad_()
    found = {
        "fused_attention": any(getattr(m, "fused_attn", False) for m in modules),
        "cached_biases": any(hasattr(m, "attention_bias_cache") for m in modules),
        "batch_norm": any(isinstance(m, _BatchNorm) for m in modules),
        "in_place": bool(in_place.operations),
        "kinks": any(kink in name for kink in _KINKS for name in names),
        "casts": shortest_dtype(moving(leaf.clone())) == torch.float32,
        "constant_inputs": bool(find_layers(prepared, image.double())[1]),
        "standardised_weights": any(
            isinstance(m, nn.Linear | nn.Conv2d) and not is_plain(m) for m in modules
        ),
    }
    return {name for name, present in found.items() if present}


class _InPlace(TorchDispatchMode):
    """Notes operations that overwrite a tensor that depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Weights are frozen, so what requires a gradient comes from the image.
        if (
            func._schema.is_mutable
            and "as_strided_" not in str(func)
            and any(getattr(a, "requires_grad", False) for a in args)
        ):
            self.operations.add(str(func))
        return func(*args, **(kwargs or {}))
