"""What one forward of a network does: operations, operators, bytes, and what its graph keeps.

Counted on the meta device, where operators know their shapes and compute nothing, in the state in
which networks are measured (``tasks.preparation``). One forward and one backward tell everything:
no module is entered by hand, so whatever a network does between its layers is counted as well.

Time and memory of a real machine are not the subject; ``tasks.work`` says how often a measurement
does what is counted here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tasks.preparation import prepare


@dataclass(frozen=True)
class LayerOutline:
    """Sizes of one call of a linear or convolutional layer, for one image.

    Attributes:
        name: Module's name in the network.
        input_size: Scalars that it reads.
        output_size: Scalars that it writes.
        positions: Tokens or patches that share its weight, 1 if it is applied once.
    """

    name: str
    input_size: int
    output_size: int
    positions: int


@dataclass(frozen=True)
class Counts:
    """What the forward of one float32 image does.

    Attributes:
        num_outputs: Number of logits.
        num_parameters: Scalars in all parameters.
        weight_bytes: Parameters and buffers as a weights file holds them.
        forward_flops: Floating-point operations (a product and a sum are 2).
        num_operators: Operators that write something: what a machine starts one by one.
        operator_bytes: What they write.
        largest_bytes: The most that one of them writes.
        graph_bytes: Activations that the graph of the input Jacobian keeps.
        double_graph_bytes: Activations that the graph of its backward keeps besides, all together.
        layers: Linear and convolutional layers in the order of their calls.
    """

    num_outputs: int
    num_parameters: int
    weight_bytes: int
    forward_flops: int
    num_operators: int
    operator_bytes: int
    largest_bytes: int
    graph_bytes: int
    double_graph_bytes: int
    layers: tuple[LayerOutline, ...]


def count(model: nn.Module, input_size: tuple[int, ...]) -> Counts:
    """Count the work of a network on the meta device.

    Args:
        model: Built on the meta device; it is put into the state of measurements.
        input_size: Shape of one image.
    """
    prepare(model)
    kept = _Kept(model)
    counter, layers = _Counter(), list[LayerOutline]()
    images = torch.empty(1, *input_size, device="meta", requires_grad=True)
    with torch.enable_grad(), kept.watching():
        with torch.device("meta"), _watched(model, layers), counter:
            logits = model(images)
        graph_bytes = kept.num_bytes
        cotangent = torch.zeros_like(logits, requires_grad=True)
        torch.autograd.grad(logits, images, cotangent, create_graph=True)
    return Counts(
        num_outputs=int(logits.shape[1]),
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        forward_flops=counter.flops,
        num_operators=counter.operators,
        operator_bytes=counter.num_bytes,
        largest_bytes=counter.largest,
        graph_bytes=graph_bytes,
        double_graph_bytes=kept.num_bytes,
        layers=tuple(layers),
    )


class _Counter(TorchDispatchMode):
    """Counts what reaches the backend; torch's own counter also tracks modules, which can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operators = self.num_bytes = self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None:
                self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
            self.operators += 1
            written = [
                t.numel() * t.element_size()
                for t in (result if isinstance(result, tuple | list) else (result,))
                if isinstance(t, torch.Tensor)
            ]
            self.num_bytes += sum(written)
            self.largest = max(self.largest, *written, 0)
        return result


class _Kept:
    """Storages that autograd keeps, each once, without the network's own."""

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self.own = {t.untyped_storage()._cdata for t in own}
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def watching(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage
        return tensor


@contextlib.contextmanager
def _watched(model: nn.Module, layers: list[LayerOutline]) -> Iterator[None]:
    """Note every call of a linear or convolutional layer."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            positions = result.numel() // result.shape[channels]
            layers.append(LayerOutline(name, args[0].numel(), result.numel(), positions))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
