"""First and second derivatives of the outputs along one direction of weight space.

For a direction v over all parameters, shared by a batch of images, and f = output(model(x)):

    jacobian_i  = J_i v         = d/dt   f(x_i; theta + t v) at t = 0
    curvature_i = D^2 f_i[v, v] = d^2/dt^2 of the same

from which, for the loss of Eq. 1 with L_i = |f_i - y_i|^2 / 2,

    v^T H_i v = |J_i v|^2 + <f_i - y_i, D^2 f_i[v, v]>.

Everything is reverse mode: k(u) = d^2/dt^2 sum_i <u_i, z_i> is a backward and a double backward,
and it is linear in u, so that its derivative in u is D^2 z[v, v] of every image. The sigmoid is put
on in float64 from the logits. Nothing is differentiated three times in t: there, and in nested
forward mode, torch's LayerNorm and InstanceNorm are wrong without a word (curvatures off by half;
torch 2.14, pytorch/pytorch#196700), while here they agree with finite differences.

Shapes: B images, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tasks.finite import require_logits
from tasks.jacobian import custom_functions, forward, outputs, slope
from tasks.measurement import Batch, MeasurementError, Output, Subject
from tasks.replaced import replaced

# What one call takes in no-grad forwards of its images, measured on ViT-Ti and ResNet-18 (CPU,
# batch 4). Its graphs held 340 and 200 MiB per image of 224 x 224.
DIRECTIONAL_COST = 23.0


@dataclass(frozen=True, eq=False)
class Directional:
    """Derivatives of a batch along one direction of weight space.

    Attributes:
        logits: (B, N) in the dtype of the network, at the unmoved weights.
        jacobian: (B, N) float64, J_i v in f.
        curvature: (B, N) float64, D^2 f_i[v, v].
    """

    logits: torch.Tensor
    jacobian: torch.Tensor
    curvature: torch.Tensor


class QuadraticForms(NamedTuple):
    """The two parts of v^T H_i v for each image, (B,) float64 arrays in units of the loss.

    Attributes:
        gauss_newton: |J_i v|^2.
        residual: <f_i - y_i, D^2 f_i[v, v]>, which vanishes at interpolation.
    """

    gauss_newton: np.ndarray
    residual: np.ndarray


def directional(
    model: torch.nn.Module,
    images: torch.Tensor,
    output: Output,
    direction: Mapping[str, torch.Tensor],
) -> Directional:
    """Differentiate the outputs twice along a direction of weight space.

    The network's own parameters are read and not touched. ``DIRECTIONAL_COST`` forwards per image.

    Args:
        model: In eval mode, so that images do not interact.
        images: (B, C, H, W), as the network takes them.
        output: Map from logits to the outputs f.
        direction: A tensor like the parameter for every name of ``model.named_parameters()``.

    Returns:
        The derivatives. An overflow on the way gives NaN or infinity in them.

    Raises:
        MeasurementError: If the logits are not (B, N) or do not depend on the weights through
            autograd, or if an operation cannot be differentiated as often as this takes.
    """
    with torch.enable_grad():
        step = torch.zeros((), dtype=images.dtype, device=images.device, requires_grad=True)
        moved = {
            name: parameter.detach() + step * direction[name]
            for name, parameter in model.named_parameters()
        }
        logits = forward(replaced(model, moved), images.clone())
        if not logits.requires_grad:
            raise MeasurementError(
                "second derivatives: the logits do not depend on the weights through autograd. "
                "Look for torch.no_grad, detach or .data in the model's forward."
            )
        cotangent = torch.zeros_like(logits, requires_grad=True)
        try:
            first, second = _products(logits, step, cotangent)
        except (NotImplementedError, RuntimeError) as error:
            if not _is_missing_derivative(error):
                raise  # out of memory, for example: the caller's business
            raise MeasurementError(
                "second derivatives: an operation of the network cannot be differentiated often "
                f"enough: {str(error).splitlines()[0]} {custom_functions(logits)} Replace the "
                "operation, or leave this measurement out for this network."
            ) from error
    return _with_output(logits.detach(), first.double(), second.double(), output)


def quadratic_forms(
    subject: Subject, batch: Batch, direction: Mapping[str, torch.Tensor]
) -> QuadraticForms:
    """Both parts of v^T H_i v for the loss L_i = |f_i - y_i|^2 / 2 of each image (Eq. 1).

    Args:
        subject: The checkpoint; ``batch_size`` images are differentiated at a time.
        batch: Images that share the direction.
        direction: See ``directional``.

    Raises:
        MeasurementError: If the images or logits are not finite, the outputs are not one per class
            of the targets, or for the reasons of ``directional``.
    """
    parts: list[torch.Tensor] = []
    size = subject.batch_size
    for start in range(0, len(batch.samples), size):
        part = batch.part(slice(start, start + size))
        found = directional(subject.model, part.inputs, subject.output, direction)
        require_logits(subject.model, part, found.logits)
        errors = outputs(found.logits.double(), subject.output) - part.targets.double()
        residual = errors * found.curvature
        parts.append(torch.stack([found.jacobian.square().sum(1), residual.sum(1)]).cpu())
    gauss_newton, residual = torch.cat(parts, 1).numpy()
    return QuadraticForms(gauss_newton, residual)


def _products(
    logits: torch.Tensor, step: torch.Tensor, cotangent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """J_z v and D^2 z[v, v] of every image, (B, N) each, from the graph of the logits."""
    (rise,) = torch.autograd.grad(logits, step, cotangent, create_graph=True)
    (first,) = torch.autograd.grad(rise, cotangent, retain_graph=True)
    (bend,) = torch.autograd.grad(rise, step, create_graph=True, allow_unused=True)
    if bend is None:  # the logits are linear in the weights
        return first, torch.zeros_like(first)
    (second,) = torch.autograd.grad(bend, cotangent)
    return first, second


def _with_output(
    logits: torch.Tensor, first: torch.Tensor, second: torch.Tensor, output: Output
) -> Directional:
    """Put the output map on derivatives of the logits, all float64."""
    if output == "identity":
        return Directional(logits, first, second)
    rise = slope(logits, output)
    # sigma'' = sigma' (sigma(-z) - sigma(z)) = -sigma' tanh(z / 2), without cancellation.
    bend = -rise * torch.tanh(logits.double() / 2)
    return Directional(logits, rise * first, rise * second + bend * first.square())


def _is_missing_derivative(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        words in text
        for words in (
            "is not implemented",  # derivative for aten::... is not implemented
            "does not support",  # batch_norm does not support 3rd+ order derivatives
            "once_differentiable",
            "does not require grad",  # a hand-written backward without a graph
            "not have been used in the graph",
        )
    )
