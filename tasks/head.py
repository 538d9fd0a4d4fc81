"""The linear head of a network, and the few output directions that carry its whole Jacobian.

Where the logits are z = W phi(x) + c, the Jacobian of f = output(z) with respect to anything
before the head is J = diag(s) W F, with the output's slopes s (N) and F = d phi. With the thin QR
factorisation diag(s) W = Q R, the r = min(N, d) rows of Q^T J = R F are products with the columns
of Q as cotangents, and J = Q Q^T J. So they have the singular values, the column norms and the
Frobenius norm of J, for the input, for every hidden activation and for every parameter before the
head: an ImageNet network with 192 features needs 192 rows and not 1000. Only the derivative with
respect to the head's own parameters has a part outside; its squared norm is |s|^2 |phi|^2 for a
weight (of a distilled head with its share of the mean, squared) and |s|^2 for a bias.

The head is found by what the network computes, not by its name, and believed only if the logits
are affine in its input; a head followed by a softmax, a norm or a cap is none.

Shapes: B images, N outputs, d features, R rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tasks.autograd_graph import nodes
from tasks.jacobian import forward
from tasks.measurement import MeasurementError, Subject
from tasks.random import generator

_CACHE_KEY = "head"
# Largest deviation from an affine map, relative to |W| |phi| + |offset| (chosen: rounding of a
# matrix product of a thousand terms is ten times smaller).
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# The map is also looked at where images and features have moved so far, in units of their root
# mean square: to see bends, and to cross the kinks of what might follow the head.
_SHIFTS = (1.0, 1e4)


@dataclass(frozen=True, eq=False)
class Head:
    """Logits as an affine map of features: z = W phi(x) + offset.

    Attributes:
        names: The linear layers that phi is the input of, in the order of their calls: one, or
            two where a distilled network averages the logits of two.
        weight: (N, d) float64, columns in that order; the share of each layer in a mean is in it.
        offset: (N,) float64.
    """

    names: tuple[str, ...]
    weight: torch.Tensor
    offset: torch.Tensor


def find_head(model: nn.Module, images: torch.Tensor) -> Head | None:
    """Find the linear layers whose inputs determine the logits as an affine map.

    A layer is considered if it is called once, on one vector per image. The inputs of all of them
    are cut from what they came from, so what the logits still depend on is the last layer on every
    path. Accepted if no path leads around them and the graph of the derivative with respect to the
    features does not hold the features (both by structure, whatever the sizes), and if slope and
    offset agree between the images and points near and far from them (which sees what is hidden
    from autograd).

    Args:
        model: In eval mode, parameters frozen.
        images: (B, C, H, W), the first two are used. float32 or float64.

    Returns:
        The head, on the device of the images; None if the network has none.

    Raises:
        MeasurementError: If the logits are not (B, N) or not finite.
    """
    candidates = _vector_layers(model, images[:1])
    count = min(len(images), 2)
    cuts = _Cuts(count)
    with torch.enable_grad(), _inputs(model, candidates, cuts):
        few = images[:count].detach()
        copies = [_moved(few, 1.0, f"images {k}") for k in range(len(_SHIFTS))]
        leaf = torch.cat([few, *copies]).requires_grad_()
        # The clone lets networks that start with an in-place operation run on a leaf.
        logits = forward(model, leaf.clone())
    if not torch.isfinite(logits[:count]).all():
        raise MeasurementError(
            "head: expected finite logits of the first images, found NaN or infinity. Check the "
            "weights and the preprocessing of this checkpoint, or use dtype = 'float64'."
        )
    reached = _leaves(logits)
    names = tuple(name for name in cuts.features if cuts.features[name] in reached)
    if not names or leaf in reached:
        return None
    features = [cuts.features[name] for name in names]
    weight = _weight(logits, features, _TOLERANCE[images.dtype])
    if weight is None:
        return None
    phi = torch.cat([x.detach().double().flatten(1) for x in features], dim=1)
    offsets = logits.detach().double() - phi @ weight.mT
    offset = offsets[:count].mean(0)
    size = phi.abs() @ weight.abs().mT + offset.abs()
    size = size + size[:count].amax(0)  # what the offset itself is known to: features may be zero
    is_affine = ((offsets - offset).abs() <= _TOLERANCE[images.dtype] * size).all()
    return Head(names, weight, offset) if is_affine else None


def subject_head(subject: Subject, images: torch.Tensor) -> Head | None:
    """``find_head`` of a checkpoint, looked for once in a process and then remembered.

    Which images it was found with shows in the rounding of ``offset`` only.
    """
    if _CACHE_KEY not in subject.cache:
        subject.cache[_CACHE_KEY] = find_head(subject.model, images)
    return subject.cache[_CACHE_KEY]


def output_basis(slope: torch.Tensor, head: Head | None) -> torch.Tensor:
    """Orthonormal cotangents for the outputs f that span the Jacobian of each image.

    Products J^T u with them (u against f, so the slope is applied to u on the way in, as
    ``tasks.jacobian`` does) give rows with all singular values and norms of J.

    Args:
        slope: (B, N) float64, ``tasks.jacobian.slope`` at the logits.
        head: None for a network without a linear head.

    Returns:
        (R, B, N) float64: the columns of Q with a non-negative diagonal of R, or the N unit
        vectors where there is no head or N <= d. Orthonormal also where slopes underflow.
    """
    count, num_outputs = slope.shape
    if head is None or num_outputs <= head.weight.shape[1]:
        unit = torch.eye(num_outputs, dtype=torch.float64, device=slope.device)
        return unit[:, None, :].expand(num_outputs, count, num_outputs)
    # Saturated sigmoids have slopes of 1e-200 and less. LAPACK's QR does not square them, that of
    # other devices may.
    largest = slope.abs().amax(1, keepdim=True)
    unit_slope = slope / torch.where(largest > 0, largest, 1.0)
    size = head.weight.abs().amax()
    weight = head.weight / (size if size > 0 else 1.0)
    q, r = torch.linalg.qr(unit_slope[:, :, None] * weight)
    diagonal = r.diagonal(dim1=1, dim2=2)
    q = q * torch.where(diagonal < 0, -1.0, 1.0).to(q)[:, None, :]
    return q.permute(2, 0, 1).contiguous()


def head_features(model: nn.Module, head: Head, images: torch.Tensor) -> torch.Tensor:
    """Features phi(x), the inputs of the head's layers side by side: (B, d) float64."""
    return logits_and_features(model, head, images)[1]


def logits_and_features(
    model: nn.Module, head: Head, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward for both: logits (B, N) in the network's dtype, features (B, d) float64."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        found[name] = x.detach().double().flatten(1).clone()  # what follows may work in place
        return x

    with torch.no_grad(), _inputs(model, head.names, keep):
        logits = forward(model, images.clone())
    return logits, torch.cat([found[name] for name in head.names], dim=1)


@dataclass(eq=False)
class _Cuts:
    """Replaces the inputs of layers by leaves: ``count`` rows as they are, their copies moved.

    Attributes:
        count: Images; row k count + i is moved copy k of image i.
        features: The leaves by layer, in the order of the calls.
    """

    count: int
    features: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        first, *copies = x.detach().clone().split(self.count)
        moved = [
            _moved(copy, shift, f"{name} {shift}")
            for copy, shift in zip(copies, _SHIFTS, strict=True)
        ]
        self.features[name] = torch.cat([first, *moved]).requires_grad_()
        return self.features[name]


def _moved(x: torch.Tensor, shift: float, key: str) -> torch.Tensor:
    """``x`` plus normal noise of ``shift`` times its root mean square."""
    noise = torch.randn(x.shape, generator=generator("head", key), dtype=torch.float64)
    return x + (shift * x.double().square().mean().sqrt() * noise.to(x.device)).to(x)


def _vector_layers(model: nn.Module, image: torch.Tensor) -> tuple[str, ...]:
    """Linear layers that are called once, on one vector per image, in the order of calls.

    The image is given twice: what is one vector for both (a table of positions) depends on neither.

    A module that stands in the network under two names is called twice if both are used.
    """
    sizes: dict[str, list[torch.Size]] = {}

    def note(name: str, x: torch.Tensor) -> torch.Tensor:
        sizes.setdefault(name, []).append(x.shape)
        return x

    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), _inputs(model, tuple(linear), note):
        forward(model, torch.cat([image, image]))
    return tuple(
        name
        for name, shapes in sizes.items()
        if len(shapes) == 1
        and shapes[0][0] == 2
        and shapes[0].numel() == 2 * linear[name].in_features
    )


@contextlib.contextmanager
def _inputs(
    model: nn.Module, names: tuple[str, ...], see: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Let ``see(name, input)`` replace the input of these layers, however it is passed."""

    def watch(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (see(name, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "input": see(name, kwargs["input"])}

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(
    logits: torch.Tensor, features: list[torch.Tensor], tolerance: float
) -> torch.Tensor | None:
    """Derivative of the logits (N, d) float64; None if it is not the same at all features."""
    rows = []
    deviations = []
    cotangent = torch.zeros_like(logits)
    for k in range(logits.shape[1]):
        cotangent[:, k] = 1
        with torch.enable_grad():
            # The graph of the derivative is looked at once: it is the same for every output.
            parts = torch.autograd.grad(logits, features, cotangent, True, create_graph=k == 0)
        if any(_leaves(part) & set(features) for part in parts):
            return None
        row = torch.cat([part.detach().double().flatten(1) for part in parts], dim=1)
        rows.append(row[0])
        deviations.append((row - row[0]).abs().amax())
        cotangent[:, k] = 0
    weight = torch.stack(rows)
    is_constant = torch.stack(deviations).amax() <= tolerance * weight.abs().amax()
    return weight if is_constant else None


def _leaves(result: torch.Tensor) -> set[torch.Tensor]:
    """Leaf tensors that autograd would send a gradient to."""
    return {n.variable for n in nodes(result) if type(n).__name__ == "AccumulateGrad"}
