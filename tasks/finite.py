"""Refusal of NaN and infinity at the network's border, with the samples and the module named."""

from __future__ import annotations

import torch

from tasks.jacobian import forward
from tasks.measurement import MeasurementError


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
