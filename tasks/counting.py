"""What one forward of a network does: operations, operators, bytes, and what its graph keeps.

Counted on the meta device, where operators know their shapes and compute nothing, in the state in
which networks are measured (``tasks.preparation``). One forward and one backward tell everything:
no module is entered by hand, so whatever a network does between its layers is counted as well.

Time and memory of a real machine are not the subject; ``tasks.work`` says how often a measurement
does what is counted here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
        backward_flops, backward_operators, backward_bytes: The same of a pass back to the image,
            a product with the transposed Jacobian.
        tangent_flops, tangent_operators, tangent_bytes: The same of a product with the Jacobian,
            the backward of that pass. Grouped convolutions do theirs group by group: thousands of
            operators.
        largest_bytes: The most that one operator of the forward writes.
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
    backward_flops: int
    backward_operators: int
    backward_bytes: int
    tangent_flops: int
    tangent_operators: int
    tangent_bytes: int
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
    forward, backward, tangent = _Counter(), _Counter(), _Counter()
    layers: list[LayerOutline] = []
    images = torch.empty(1, *input_size, device="meta", requires_grad=True)
    with torch.enable_grad(), kept.watching():
        with torch.device("meta"), _watched(model, layers), forward:
            logits = model(images)
        graph_bytes = kept.num_bytes
        cotangent = torch.zeros_like(logits, requires_grad=True)
        with backward:
            (pullback,) = torch.autograd.grad(logits, images, cotangent, create_graph=True)
    with tangent:
        torch.autograd.grad(pullback, cotangent, torch.ones_like(pullback))
    return Counts(
        num_outputs=int(logits.shape[1]),
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        forward_flops=forward.flops,
        num_operators=forward.operators,
        operator_bytes=forward.num_bytes,
        backward_flops=backward.flops,
        backward_operators=backward.operators,
        backward_bytes=backward.num_bytes,
        tangent_flops=tangent.flops,
        tangent_operators=tangent.operators,
        tangent_bytes=tangent.num_bytes,
        largest_bytes=forward.largest,
        graph_bytes=graph_bytes,
        double_graph_bytes=kept.num_bytes,
        layers=tuple(layers),
    )


class _Counter(TorchDispatchMode):
    """Counts what reaches the backend; torch's own counter also tracks modules, which can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operators = self.num_bytes = self.largest = 0
        # Convolutions of the same shapes, as groups are: the meta device takes a while for each.
        self.known: dict[tuple[Any, ...], tuple[torch.Size, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func._overloadpacket
        if packet is torch.ops.aten.convolution:
            return self._convolution(func, args)
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            formula = flop_registry.get(packet)
            if formula is not None:
                self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
            self._note(result if isinstance(result, tuple | list) else (result,))
        return result

    def _convolution(self, func: Any, args: tuple[Any, ...]) -> torch.Tensor:
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else str(a) for a in args]
        key = (args[0].dtype, *shapes)
        if key not in self.known:
            result = func(*args)
            flops = flop_registry[torch.ops.aten.convolution](*args, out_val=result)
            self.known[key] = result.shape, int(flops)
        shape, flops = self.known[key]
        result = args[0].new_empty(shape)
        self.flops += flops
        self._note((result,))
        return result

    def _note(self, results: Sequence[Any]) -> None:
        written = [t.numel() * t.element_size() for t in results if isinstance(t, torch.Tensor)]
        self.operators += 1
        self.num_bytes += sum(written)
        self.largest = max(self.largest, *written, 0)


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
