"""Gradients of a batch of images with respect to every layer's input, output and parameters.

One backward pass gives, for cotangents u of the network's outputs f,

* d(u.f) / d x_l **through layer l alone**, the J_l W_l of the paper's Eq. 4 and 12. Where the same
  activation also feeds a skip connection, autograd's total derivative is another quantity, for
  which those inequalities are false;
* d(u.f) / d z_l, the J_l of Eq. 4, from which follow the gradients of that layer's weight and bias;
* d(u.f) / d p for every other parameter p, image by image.

Every layer's input and output get a zero tensor added, of which only that layer hears; gradients
are taken with respect to the zeros. The forward runs under ``vmap`` over images, so that windows
and tokens stay with their image whatever the network folds into its batch dimension, and so that
other parameters can be given one copy per image. Backward passes are ordinary autograd.

Shapes: R cotangents, B images, N outputs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import vmap

from tasks.jacobian import expanded, forward, slope, unit_scale
from tasks.layers import Layer, find_layers
from tasks.measurement import MeasurementError, Output
from tasks.replaced import replaced


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of R cotangents, to be multiplied by ``scale`` in float64.

    Attributes:
        scale: (R, B) float64 factor of all gradients of a cotangent and image: keeps tiny slopes
            of saturated outputs from underflowing on the way through the network.
        images: (R, B, C, H, W), or None if not asked for.
        inputs: By layer index, (R, B, *input_shape).
        outputs: By layer index, (R, B, *output_shape).
        others: By parameter name, (R, B, *shape).
    """

    scale: torch.Tensor
    images: torch.Tensor | None
    inputs: dict[int, torch.Tensor]
    outputs: dict[int, torch.Tensor]
    others: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """A batch's forward pass, ready for backward passes; holds its graph while it lives.

    Attributes:
        logits: (B, N) in the dtype of the images.
        slope: (B, N) float64, derivative of the output map at the logits.
        layers: In the order of their calls.
        inputs: Each layer's input, (B, *input_shape).
        others: Names of the parameters that no layer owns.
        constant: Linear and convolutional modules whose input does not depend on the image
            (relative-position networks). They are no layers; their parameters are among ``others``.
    """

    logits: torch.Tensor
    slope: torch.Tensor
    layers: tuple[Layer, ...]
    inputs: tuple[torch.Tensor, ...]
    others: tuple[str, ...]
    constant: tuple[str, ...]
    _graph_logits: torch.Tensor
    _images: torch.Tensor
    _input_zeros: tuple[torch.Tensor, ...]
    _output_zeros: tuple[torch.Tensor, ...]
    _copies: dict[str, torch.Tensor]

    def pull(
        self,
        cotangents: torch.Tensor,
        *,
        images: bool = False,
        inputs: Sequence[int] = (),
        outputs: Sequence[int] = (),
        others: bool = False,
    ) -> Gradients:
        """Backward passes of several cotangents, as one batched pass.

        Costs about 1.1 to 1.3 forwards per cotangent and image, whatever is asked for. Memory
        grows with R: pass few cotangents at a time.

        Args:
            cotangents: (R, B, N), of the outputs f (the output map's slope is applied here).
            images: Whether to return gradients of the images.
            inputs: Indices of the layers whose path gradients to return.
            outputs: Indices of the layers whose output gradients to return.
            others: Whether to return gradients of the parameters that no layer owns. Needs a graph
                built with ``parameters=True``.
        """
        weighted = self.slope * cotangents.double()
        scale = unit_scale(weighted.flatten(0, 1)).unflatten(0, weighted.shape[:2])
        wanted = [self._images] if images else []
        wanted += [self._input_zeros[k] for k in inputs] + [self._output_zeros[k] for k in outputs]
        wanted += list(self._copies.values()) if others else []
        with _image_by_image():
            found = torch.autograd.grad(
                self._graph_logits,
                wanted,
                (weighted / scale[..., None]).to(self.logits.dtype),
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        parts = iter(
            weighted.new_zeros(len(cotangents), *w.shape, dtype=w.dtype) if g is None else g
            for g, w in zip(found, wanted, strict=True)
        )
        return Gradients(
            scale=scale,
            images=next(parts) if images else None,
            inputs={k: next(parts) for k in inputs},
            outputs={k: next(parts) for k in outputs},
            others={name: next(parts) for name in self._copies} if others else {},
        )

    def gram(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The operator u -> A A^T u, A = d f / d x_l through layer l alone, for each image.

        Returns:
            Function from (B, N) to (B, N) float64. Each call costs at most one backward and one
            product with its transpose; the shorter the way from the layer to the outputs, the less.

        Raises:
            MeasurementError: If an operation behind the layer cannot be differentiated twice.
        """
        zeros = self._input_zeros[layer]
        with torch.enable_grad():
            cotangent = torch.zeros_like(self._graph_logits, requires_grad=True)
            (pullback,) = torch.autograd.grad(
                self._graph_logits, zeros, cotangent, create_graph=True
            )
        if not pullback.requires_grad:
            raise MeasurementError(
                f"layer {self.layers[layer].name}: expected a backward pass that can be "
                "differentiated again, found one without a graph. Use method = 'exact'."
            )

        def apply(u: torch.Tensor) -> torch.Tensor:
            pulled = self.pull(u[None], inputs=[layer])
            direction = pulled.inputs[layer][0]
            # Squares of Jacobians of 1e-24 or 1e24 would leave float32.
            size = unit_scale(direction)
            unit = direction / expanded(size, direction)
            (product,) = torch.autograd.grad(pullback, cotangent, unit, retain_graph=True)
            return self.slope * product.double() * (pulled.scale[0] * size.double())[:, None]

        return apply


def layer_graph(
    model: nn.Module, images: torch.Tensor, output: Output, *, parameters: bool = False
) -> LayerGraph:
    """Run a batch forward and keep what backward passes to every layer need.

    Args:
        model: In eval mode, parameters frozen.
        images: (B, C, H, W), as the network takes them.
        output: Map from logits to the outputs that gradients refer to.
        parameters: Whether gradients of the parameters that no layer owns will be asked for. Takes
            one copy of those parameters per image.

    Returns:
        The graph; memory is about three times that of the activations.

    Raises:
        MeasurementError: If the network does not call the same layers for every image, or cannot
            run under vmap.
    """
    layers, constant = find_layers(model, images[:1])
    owned = {id(p) for layer in layers if layer.owns_parameters for p in layer.module.parameters()}
    values = dict(model.named_parameters())
    others = tuple(name for name, p in values.items() if id(p) not in owned)
    count = len(images)
    copies = {
        name: values[name].detach().expand(count, *values[name].shape).clone().requires_grad_()
        for name in (others if parameters else ())
    }
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        input_zeros = tuple(_zeros(leaf, (count, *layer.input_shape)) for layer in layers)
        output_zeros = tuple(_zeros(leaf, (count, *layer.output_shape)) for layer in layers)

        def one_image(
            image: torch.Tensor,
            input_zeros: tuple[torch.Tensor, ...],
            output_zeros: tuple[torch.Tensor, ...],
            copies: dict[str, torch.Tensor],
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with _added(layers, input_zeros, output_zeros) as seen:
                logits = forward(replaced(model, copies), image[None].clone())
            if len(seen) != len(layers):
                raise MeasurementError(
                    f"layers: expected {len(layers)} calls of linear and convolutional layers, as "
                    f"for the first image, found {len(seen)}. The network's forward varies."
                )
            return logits[0], tuple(seen[k] for k in range(len(layers)))

        try:
            with _image_by_image():
                logits, inputs = vmap(one_image)(leaf, input_zeros, output_zeros, copies)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "vmap" not in str(error):
                raise
            raise MeasurementError(
                "layers: the network cannot run image by image under torch.vmap: "
                f"{str(error).splitlines()[0]} Replace the operation."
            ) from error
    return LayerGraph(
        logits=logits.detach(),
        slope=slope(logits.detach(), output),
        layers=layers,
        inputs=inputs,
        others=others,
        constant=constant,
        _graph_logits=logits,
        _images=leaf,
        _input_zeros=input_zeros,
        _output_zeros=output_zeros,
        _copies=copies,
    )


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A differentiable tensor of zeros that takes no memory."""
    return like.new_zeros((), requires_grad=True).expand(shape)


@contextlib.contextmanager
def _image_by_image() -> Iterator[None]:
    """Silence the remark that vmap runs a few operations (pooling of some layouts) in a loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


@contextlib.contextmanager
def _added(
    layers: Sequence[Layer],
    input_zeros: Sequence[torch.Tensor],
    output_zeros: Sequence[torch.Tensor],
) -> Iterator[dict[int, torch.Tensor]]:
    """Add the zeros while the network runs; yields the dictionary that the layers' inputs join."""
    index: dict[tuple[nn.Module, int], int] = {
        (layer.module, layer.call): k for k, layer in enumerate(layers)
    }
    calls: Counter[nn.Module] = Counter()
    seen: dict[int, torch.Tensor] = {}

    def before(
        module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        calls[module] += 1
        k = index.get((module, calls[module]))
        if k is None:
            return None
        seen[k] = args[0].detach()
        return (args[0] + input_zeros[k], *args[1:])

    def after(module: nn.Module, args: object, result: torch.Tensor) -> torch.Tensor | None:
        k = index.get((module, calls[module]))
        return None if k is None else result + output_zeros[k]

    modules = {layer.module for layer in layers}
    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
