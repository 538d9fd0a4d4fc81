"""Refusals at the network's border: NaN, infinity, and outputs that are not the data set's classes.

Samples and the first module at fault are named.
"""

from __future__ import annotations

import torch

from tasks.jacobian import JacobianBatch, forward, jacobian_batch
from tasks.measurement import Batch, MeasurementError, Subject


def checked_jacobian(subject: Subject, batch: Batch) -> JacobianBatch:
    """The Jacobians of a batch.

    Raises:
        MeasurementError: If logits are NaN or infinite, or are not one per class of the data set.
    """
    jacobian = jacobian_batch(subject.model, batch.inputs, subject.output)
    require_logits(subject.model, batch, jacobian.logits)
    return jacobian


def require_logits(model: torch.nn.Module, batch: Batch, logits: torch.Tensor) -> None:
    """Refuse logits (B, N) of a batch that are not finite, or not one per class of the data set.

    Raises:
        MeasurementError: Naming the samples, or both numbers.
    """
    require_finite(model, batch.inputs, logits, batch.samples)
    if logits.shape[1] != batch.targets.shape[1]:
        raise MeasurementError(
            f"expected {batch.targets.shape[1]} outputs, one per class of the data set, found "
            f"{logits.shape[1]}. Use the data set that the network was trained for."
        )


def require_finite(
    model: torch.nn.Module, images: torch.Tensor, logits: torch.Tensor, samples: tuple[int, ...]
) -> None:
    """Raise MeasurementError naming the samples whose images or logits are NaN or infinite."""
    for what, values in (("images", images), ("logits", logits)):
        bad = ~torch.isfinite(values).flatten(1).all(1).cpu()
        if bad.any():
            names = [sample for sample, is_bad in zip(samples, bad.tolist(), strict=True) if is_bad]
            cause = (
                "Check the images and the preprocessing."
                if what == "images"
                else f"{_first_nonfinite_module(model, images)} Check the weights, or use float64."
            )
            raise MeasurementError(f"samples {names}: NaN or infinite {what}. {cause}")


def _first_nonfinite_module(model: torch.nn.Module, images: torch.Tensor) -> str:
    """Name the first module to return NaN or infinity."""
    found: list[str] = []

    def watch(name: str, module: torch.nn.Module):
        def hook(_module: object, _args: object, result: object) -> None:
            if isinstance(result, torch.Tensor) and not torch.isfinite(result).all():
                found.append(f"{name or 'model'} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward(model, images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return f"First at module {found[0]}." if found else "No single module could be named."
