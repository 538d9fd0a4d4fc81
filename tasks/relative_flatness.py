"""Relative flatness of the last linear layer, in closed form: no Hessian is formed.

For a layer with rows w_s and a loss L, Petzka et al. (arXiv 2001.00939) define

    kappa = sum_{s,s'} <w_s, w_s'> Tr(H_{s,s'}),    H_{s,s'} = d^2 L / dw_s dw_s'.

If the logits are z = W phi(x) + c and L is a mean over images, H_{s,s'} is the mean of
(H_z)_{s,s'} phi phi^T with the Hessian H_z of the image's loss in its logits, so

    kappa = mean_i |phi(x_i)|^2 tr(W W^T H_z(x_i)),

a mean over images with O(N d) work for each, where the Hessian has (N d)^2 entries. Large kappa
means sharp, its name notwithstanding. With f = output(z) and slopes s = f'(z):

    half_squared_error  1/2 |f - y|^2 (Eq. 1)    H_z = diag(s^2 + (f - y) f''(z))
    mse                 1/N |f - y|^2            2/N times that
    cross_entropy       -log softmax(z)_y        H_z = diag(p) - p p^T, p = softmax(z)

With the identity as output, the first is |W|_F^2 mean |phi|^2 for any labels. With sigmoids H_z has
negative entries where f is far from y, so kappa may be negative away from interpolation.

The variant with the largest eigenvalue of H_{s,s'} instead of its trace is not computed: it is not
a mean over images. Where a network averages the logits of two heads, kappa is the sum over both,
each a layer of its own.

Shapes: B images, N outputs, d features.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

import torch

from tasks.batches import aligned_batches
from tasks.block import Block
from tasks.finite import require_finite, require_logits
from tasks.head import Head, logits_and_features, subject_head
from tasks.jacobian import forward, slope
from tasks.measurement import (
    Batch,
    Columns,
    Estimate,
    Measurement,
    MeasurementError,
    Output,
    Row,
    Status,
    Subject,
)
from tasks.outline import Outline
from tasks.sample_mean import sample_mean

_NAME = "relative_flatness"


class RelativeFlatness(Measurement):
    """Settings of the relative flatness of the last linear layer.

    Attributes:
        loss: ``half_squared_error`` is the paper's (Eq. 1). ``mse`` is the mean over outputs and
            images, as the paper's code calls it (``MSELoss()``): 2/N times as large.
            ``cross_entropy`` is that of the logits, whatever the run's ``output``.
    """

    metric: ClassVar[str] = _NAME
    version: ClassVar[int] = 1
    quantities: ClassVar[tuple[str, ...]] = (_NAME,)
    needs_labels: ClassVar[bool] = True

    loss: Literal["half_squared_error", "mse", "cross_entropy"] = "half_squared_error"

    def measure(self, subject: Subject, block: Block) -> list[Row]:
        """One row per image.

        Raises:
            MeasurementError: If the network does not end in a linear layer, gives NaN for an
                image, or has another number of outputs than the data set has classes.
        """
        head = _head(subject, subject.batch(block.samples[:2]))
        rows: list[Row] = []
        for chunk in aligned_batches(block.samples, subject.batch_size):
            started = time.perf_counter()
            batch = subject.batch(chunk)
            values = self._values(subject, batch, head)
            seconds = (time.perf_counter() - started) / len(chunk)
            rows += [
                Row(
                    quantity=_NAME,
                    value=float(value) if is_finite else float("nan"),
                    sample=sample,
                    status=Status.OK if is_finite else Status.NOT_FINITE,
                    forward_equivalents=1.0,
                    seconds=seconds,
                )
                for sample, value, is_finite in zip(
                    batch.samples, values.tolist(), values.isfinite().tolist(), strict=True
                )
            ]
        return rows

    def summarize(self, rows: Columns) -> list[Estimate]:
        """Mean over images with its Student interval (95 %)."""
        return [sample_mean(rows, _NAME)]

    def forward_equivalents(self, network: Outline) -> float:
        """One forward per image."""
        return 1.0

    def _values(self, subject: Subject, batch: Batch, head: Head) -> torch.Tensor:
        """|phi|^2 tr(W W^T H_z) of each image, (B,) float64."""
        raw, features = logits_and_features(subject.model, head, batch.inputs)
        require_logits(subject.model, batch, raw)
        logits, targets = raw.double(), batch.targets.double()
        value = torch.zeros_like(logits[:, 0])
        widths = [subject.model.get_submodule(name).in_features for name in head.names]
        for weight, phi in zip(
            head.weight.split(widths, dim=1), features.split(widths, dim=1), strict=True
        ):
            if self.loss == "cross_entropy":
                trace = _softmax_trace(weight, logits)
            else:
                trace = _squared_error_trace(weight, logits, targets, subject.output)
            value += phi.square().sum(1) * trace
        return value * (2 / logits.shape[1] if self.loss == "mse" else 1)


def _head(subject: Subject, batch: Batch) -> Head:
    with torch.no_grad():
        logits = forward(subject.model, batch.inputs.clone())
    require_finite(subject.model, batch.inputs, logits, batch.samples)
    head = subject_head(subject, batch.inputs)
    if head is None:
        raise MeasurementError(
            f"{_NAME}: expected logits that are an affine map of the input of a linear layer, "
            "called once on one vector per image; found no such layer. The closed form holds for "
            "networks that end in a linear layer; leave this measurement out for this checkpoint."
        )
    return head


def _squared_error_trace(
    weight: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, output: Output
) -> torch.Tensor:
    """tr(W W^T H_z) of 1/2 |f - y|^2: sum_k |w_k|^2 (s_k^2 + (f_k - y_k) f''_k), (B,)."""
    first = slope(logits, output)
    curvature = first.square()
    if output == "sigmoid":
        # f - y without the cancellation of f - 1; f'' = f' (1 - 2 f) = -f' tanh(z / 2).
        error = (1 - targets) * torch.sigmoid(logits) - targets * torch.sigmoid(-logits)
        curvature -= error * first * torch.tanh(logits / 2)
    return curvature @ weight.square().sum(1)


def _softmax_trace(weight: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """tr(W W^T (diag p - p p^T)): sum_k p_k |w_k - w_t|^2 - |sum_k p_k (w_k - w_t)|^2, (B,).

    With t the largest logit. Of sum_k p_k |w_k|^2 - |W^T p|^2 no digit is left where p_t is 1 up
    to rounding, as for most images of a trained network.
    """
    top = logits.argmax(1)
    others = torch.softmax(logits, dim=1).scatter(1, top[:, None], 0.0)
    norms = weight.square().sum(1)
    distances = norms + norms[top, None] - 2 * weight[top] @ weight.mT
    mean = others @ weight - others.sum(1, keepdim=True) * weight[top]
    return (others * distances).sum(1) - mean.square().sum(1)
