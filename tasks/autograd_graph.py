"""The graph behind a tensor: what autograd would run, node by node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def nodes(result: torch.Tensor) -> Iterator[Any]:
    """Every node that a backward from ``result`` could reach, once each, leaves included.

    Depth first from the result: the same graph is walked in the same order.
    """
    seen: set[Any] = set()
    stack: list[Any] = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)
