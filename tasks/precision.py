"""Precision inside a network: casts to fewer digits, found in a graph or ignored in float64.

Some networks compute a part of themselves in float32 whatever their weights are: timm's
``efficientvit_mit`` casts the queries, keys and values of its linear attention, others their
position tables. Converted to float64 they would still have float32's rounding, which no comparison
of their products with each other shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tasks.autograd_graph import nodes

_CASTS = frozenset(
    (
        torch.Tensor.float,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.type_as,
    )
)


class KeepFloat64(TorchFunctionMode):
    """While active, casts of float64 tensors to shorter floating types leave them as they are.

    The function that the network stands for stays, without the rounding of its casts.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and take its argument for its result where it only drops digits."""
        found = func(*args, **(kwargs or {}))
        if func not in _CASTS or not isinstance(found, torch.Tensor):
            return found
        loses = args[0].dtype == torch.float64 != found.dtype and found.is_floating_point()
        return args[0].to(found.device) if loses else found


def shortest_dtype(logits: torch.Tensor) -> torch.dtype:
    """The floating type of fewest digits on the way from whatever requires a gradient.

    Args:
        logits: With their graph. What does not depend on a leaf of it (tables of positions) is not
            in the graph and does not count.
    """
    found = {logits.dtype}
    for node in nodes(logits):
        found.update(part.dtype for part in node._input_metadata)
    return max((d for d in found if d.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
