"""The published code's search for the largest local sensitivity, kept for comparison.

It maximises ||f(x) - f(x + delta)|| / ||delta|| over *finite* perturbations delta by 30 steps of
Adam (chinsengi/sharpdim, src/pert.py, eval_mls_adv). The ratio is neither an upper nor a lower
bound of the Jacobian's largest singular value: away from delta = 0 it may lie on either side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tasks.jacobian import outputs
from tasks.measurement import Output

# Their values.
NUM_STEPS = 30
_LEARNING_RATE = 0.1
_START_SCALE = 0.1


def adversarial_ratios(
    model: torch.nn.Module,
    images: torch.Tensor,
    output: Output,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """The ratio found for each image: the last one evaluated, before the last step, as there.

    Their script runs one image at a time. Adam works element by element, so a batch is the same
    recurrence for each of its images. Starts are seeded here, not there.

    Args:
        model: In eval mode, parameters frozen.
        images: (B, C, H, W).
        output: Map from logits to f.
        generators: One CPU generator per image, for its start.

    Returns:
        (B,) float64, in units of [f] / [x].
    """
    with torch.no_grad():
        reference = outputs(model(images), output)
    starts = [torch.randn(images.shape[1:], generator=g) for g in generators]
    delta = (_START_SCALE * torch.stack(starts)).to(images).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=_LEARNING_RATE)
    ratios = torch.zeros(len(images))
    for _ in range(NUM_STEPS):
        perturbed = outputs(model(images + delta), output)
        ratios = (reference - perturbed).norm(dim=1) / delta.flatten(1).norm(dim=1)
        (delta.grad,) = torch.autograd.grad(-ratios.sum(), delta)
        optimizer.step()
    return ratios.detach().double()
