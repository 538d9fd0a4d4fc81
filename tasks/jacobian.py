"""Products with the input Jacobians of a batch of images, without forming them.

For image i, J_i = d f(x_i) / d x_i with f = output(model(x)), output the sigmoid or the identity.
In eval mode images do not interact, so the Jacobian of a batch is block diagonal and one product
serves all images. Both J and its transpose come from one graph per batch, differentiated twice:
g(u0) = J_z^T u0 is linear in u0, so the transpose of g is J_z (reverse over reverse).

Products run in the dtype of the images. The sigmoid's slope s = sigma(z) sigma(-z) is taken from
the logits in float64, because y (1 - y) has lost all its digits at logit 17 in float32, and every
cotangent is scaled to unit size before it enters the network, so that neither saturated outputs
nor large or tiny Jacobians underflow or overflow on the way.

``torch.func.linearize`` is not used: its constant folding keeps tensors that in-place operations
later overwrite, which gives wrong products from its second call on.

Shapes: B images, N outputs, C x H x W inputs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tasks.autograd_graph import nodes
from tasks.measurement import MeasurementError, Output
from tasks.precision import KeepFloat64

# Costs in no-grad forwards of one image, measured on ViT-Ti and ViT-S (CPU, batch 8).
DOUBLE_GRAPH_COST = 2.3  # forward with math attention and the graph of its backward
VJP_COST = 1.2
JVP_COST = 1.4


@dataclass(frozen=True, eq=False)
class JacobianBatch:
    """The Jacobians J_i of a batch as linear operators; holds the batch's graph while it lives.

    Attributes:
        logits: (B, N) in the dtype of the images.
        slope: (B, N) float64, derivative of the output map at the logits.
    """

    logits: torch.Tensor
    slope: torch.Tensor
    _images: torch.Tensor
    _graph_logits: torch.Tensor
    _cotangent: torch.Tensor
    _pullback: torch.Tensor

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """Transposed products J_i^T u_i.

        Args:
            u: (B, N), one cotangent per image.

        Returns:
            (B, C, H, W) in the dtype of the images.
        """
        direction, scale = self._scaled_vjp(u)
        return direction * expanded(scale, direction).to(direction.dtype)

    def jvp(self, w: torch.Tensor) -> torch.Tensor:
        """Products J_i w_i.

        Args:
            w: (B, C, H, W), one tangent per image.

        Returns:
            (B, N) float64.
        """
        scale = unit_scale(w)
        tangent = (w / expanded(scale, w)).to(self._images.dtype)
        (products,) = torch.autograd.grad(
            self._pullback, self._cotangent, tangent, retain_graph=True
        )
        return self.slope * products.double() * scale.double()[:, None]

    def gram(self, u: torch.Tensor) -> torch.Tensor:
        """Symmetric products J_i J_i^T u_i: one transposed product, then one product.

        Args:
            u: (B, N), one cotangent per image.

        Returns:
            (B, N) float64.
        """
        direction, scale = self._scaled_vjp(u)
        return self.jvp(direction) * scale[:, None]

    def _scaled_vjp(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """J^T u as a tensor in the images' dtype and a float64 factor (B,) to multiply it by."""
        cotangent = self.slope * u.double()
        scale = unit_scale(cotangent)
        (direction,) = torch.autograd.grad(
            self._graph_logits,
            self._images,
            (cotangent / scale[:, None]).to(self.logits.dtype),
            retain_graph=True,
        )
        return direction, scale


def jacobian_batch(model: torch.nn.Module, images: torch.Tensor, output: Output) -> JacobianBatch:
    """Build the operator for a batch.

    Costs about 2.3 forwards per image once, then about 1.2 per ``vjp`` and 1.4 per ``jvp``.

    Args:
        model: In eval mode, parameters frozen.
        images: (B, C, H, W), as the network takes them.
        output: Map from logits to the outputs that J refers to.

    Returns:
        The operator; its graph is freed with it.

    Raises:
        MeasurementError: If the logits are not (B, N), do not depend on the images through
            autograd, or an operation cannot be differentiated twice.
    """
    with torch.enable_grad():
        leaf, logits = _forward_with_graph(model, images)
        cotangent = torch.zeros_like(logits, requires_grad=True)
        try:
            (pullback,) = torch.autograd.grad(logits, leaf, cotangent, create_graph=True)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise  # a smaller batch may succeed: the caller's business
            raise MeasurementError(
                f"Jacobian: the network cannot be differentiated with respect to its input: {error}"
            ) from error
    if not pullback.requires_grad:
        raise MeasurementError(
            "Jacobian: expected a backward pass that can be differentiated again, found one "
            f"without a graph. {custom_functions(logits)}"
        )
    return JacobianBatch(
        logits=logits.detach(),
        slope=slope(logits.detach(), output),
        _images=leaf,
        _graph_logits=logits,
        _cotangent=cotangent,
        _pullback=pullback,
    )


def dense_jacobian(
    model: torch.nn.Module, images: torch.Tensor, output: Output = "identity"
) -> torch.Tensor:
    """All rows of every J_i, by N transposed products (about 1.25 N + 2 forwards per image).

    Rows are computed in the dtype of the images and scaled by the output's slope in float64.

    Args:
        model: In eval mode, parameters frozen.
        images: (B, C, H, W). Memory is 8 B N C H W bytes: pass few images when N is large.
        output: Map from logits to the outputs that J refers to.

    Returns:
        (B, N, C, H, W) float64.

    Raises:
        MeasurementError: If the logits are not (B, N) or do not depend on the images.
    """
    with torch.enable_grad():
        leaf, logits = _forward_with_graph(model, images)
    num_outputs = logits.shape[1]
    rows = leaf.new_empty((len(images), num_outputs, *leaf.shape[1:]), dtype=torch.float64)
    cotangent = torch.zeros_like(logits)
    for k in range(num_outputs):
        cotangent[:, k] = 1
        (row,) = torch.autograd.grad(logits, leaf, cotangent, retain_graph=True)
        rows[:, k] = row
        cotangent[:, k] = 0
    return rows.mul_(expanded(slope(logits.detach(), output), rows))


def forward(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (B, N) with math attention, the only kind that can be differentiated twice.

    Of float64 images, in float64 throughout: casts inside the network are ignored.

    Raises:
        MeasurementError: If the network returns anything but one (B, N) tensor.
    """
    float64 = KeepFloat64() if images.dtype == torch.float64 else contextlib.nullcontext()
    with sdpa_kernel(SDPBackend.MATH), float64:
        logits = model(images)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise MeasurementError(
            f"Jacobian: expected logits of shape ({len(images)}, N), found {found}. "
            "Use a classifier with one output vector per image."
        )
    return logits


def outputs(logits: torch.Tensor, output: Output) -> torch.Tensor:
    """Network outputs f (B, N) of logits (B, N), in the logits' dtype."""
    return torch.sigmoid(logits) if output == "sigmoid" else logits


def slope(logits: torch.Tensor, output: Output) -> torch.Tensor:
    """Derivative of the output map at the logits (B, N), (B, N) float64.

    From the logits, not from f (1 - f), which has lost its digits where the sigmoid saturates.
    """
    z = logits.double()
    return torch.sigmoid(z) * torch.sigmoid(-z) if output == "sigmoid" else torch.ones_like(z)


def custom_functions(logits: torch.Tensor) -> str:
    """Name the hand-written autograd functions in a graph: the usual origin of wrong gradients."""
    names = {
        type(node).__name__.removesuffix("Backward")
        for node in nodes(logits)
        if isinstance(node, torch.autograd.function.BackwardCFunction)
    }
    if not names:
        return "The graph holds no hand-written autograd function."
    return f"Hand-written autograd functions in the graph: {', '.join(sorted(names))}."


def _forward_with_graph(
    model: torch.nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf with the images and the logits computed from it."""
    leaf = images.detach().requires_grad_()
    # The clone lets networks that start with an in-place operation run on a leaf.
    logits = forward(model, leaf.clone())
    if not logits.requires_grad:
        raise MeasurementError(
            "Jacobian: the logits do not depend on the images through autograd. Look for "
            "torch.no_grad, detach or integer casts in the model's forward."
        )
    return leaf, logits


def unit_scale(t: torch.Tensor) -> torch.Tensor:
    """Power of two near the largest magnitude per image (B,), 1 where all entries are zero."""
    largest = t.abs().flatten(1).amax(1)
    power = torch.exp2(torch.frexp(largest).exponent.to(largest.dtype) - 1)
    return torch.where((largest > 0) & torch.isfinite(largest), power, torch.ones_like(largest))


def expanded(per_image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View a (B,) or (B, N) tensor so that it broadcasts against ``like``."""
    return per_image.reshape(*per_image.shape, *([1] * (like.ndim - per_image.ndim)))
