"""Multiplicative Gaussian weight noise, drawn, applied and taken back exactly.

A draw replaces every parameter theta by theta * (1 + scale * z) with z ~ N(0, I), that is by
theta + delta with delta ~ N(0, scale**2 diag(theta**2)). Every ``torch.nn.Parameter`` takes part,
frozen or not, tied ones once; buffers never.

For the duration of the context the parameters are views into one flat buffer, so that a draw is
one random fill and one fused multiply-add however many tensors the network has. The original
tensors are put aside untouched and put back at the end: restoring involves no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tasks.measurement import MeasurementError

# Every parameter starts on a 64-byte boundary, as torch's own allocations do, so that matrix
# kernels see the alignment they are used to.
_ALIGNMENT_BYTES = 64
_ALIGNMENT = _ALIGNMENT_BYTES // 4


@dataclass(frozen=True, slots=True)
class PerturbableWeights:
    """Weights of one network as flat vectors of length P (with padding; the padding is zero).

    Attributes:
        original: The weights theta.
        noise: The current draw z. Always float32, so that one key gives one draw whatever the
            network's dtype; 24 bits of a normal number are far below any Monte-Carlo error.
        current: What the network computes with.
    """

    original: torch.Tensor
    noise: torch.Tensor
    current: torch.Tensor

    def draw(self, generator: torch.Generator) -> None:
        """Replace the draw z by the generator's next P normal numbers."""
        self.noise.normal_(generator=generator)

    def perturb(self, scale: float) -> None:
        """Set the weights to theta * (1 + scale * z)."""
        noise = self.noise.to(self.original.dtype)
        torch.addcmul(self.original, self.original, noise, value=scale, out=self.current)

    def restore(self) -> None:
        """Set the weights to theta, by copying."""
        self.current.copy_(self.original)


@contextmanager
def perturbable(model: torch.nn.Module) -> Iterator[PerturbableWeights]:
    """Give a network weights that can be perturbed; the originals are back afterwards.

    The draw's layout is ``named_parameters`` order, each tensor padded to a multiple of 16
    numbers: networks of one shape share their draws. Needs three times the memory of the weights
    on top of the network.

    Args:
        model: On one device, with parameters of one floating dtype.

    Yields:
        The flat weights. On leaving, also by an exception, every parameter holds the very tensor
        it held before.

    Raises:
        MeasurementError: If there are no parameters, or of several dtypes or devices.
    """
    parameters = [parameter for _, parameter in model.named_parameters()]
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1 or not parameters[0].is_floating_point():
        found = sorted(f"{dtype} on {device}" for dtype, device in kinds) or "no parameters"
        raise MeasurementError(
            f"weight noise needs parameters of one floating dtype on one device, found {found}. "
            "Convert the network with .to(dtype) before measuring it."
        )
    ((dtype, device),) = kinds
    padded = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    weights = PerturbableWeights(
        original=torch.zeros(sum(padded), dtype=dtype, device=device),
        noise=torch.zeros(sum(padded), dtype=torch.float32, device=device),
        current=torch.zeros(sum(padded), dtype=dtype, device=device),
    )
    kept = [parameter.data for parameter in parameters]
    starts = weights.original.split(padded)
    views = weights.current.split(padded)
    try:
        for parameter, tensor, start, view in zip(parameters, kept, starts, views, strict=True):
            start[: tensor.numel()].copy_(tensor.reshape(-1))
            parameter.data = view[: tensor.numel()].view(tensor.shape)
        weights.restore()
        yield weights
    finally:
        for parameter, tensor in zip(parameters, kept, strict=True):
            parameter.data = tensor
