"""A zero-padded convolution on images of one size as a linear operator, in float64.

Along one axis, output i and tap a of the kernel meet at position u = stride i + dilation a of the
padded input. What follows from that alone (output size, overlap of patches, the circle a
convolution can be wrapped on) is in ``Axis``; ``Convolution`` holds two axes and the kernel.

Shapes: G groups, O and I output and input channels of one group, h x w the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import nn
from torch.nn import functional as F

from tasks.measurement import MeasurementError


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution.

    Attributes:
        size: Input positions.
        kernel: Taps of the kernel.
        stride: Input positions from one output to the next.
        dilation: Input positions from one tap to the next.
        before: Zeros in front of the input.
        after: Zeros behind it.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def extent(self) -> int:
        """Positions that one patch spans, gaps of the dilation included."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def out(self) -> int:
        """Output positions, below 1 where the padded input is smaller than the kernel."""
        return (self.size + self.before + self.after - self.extent) // self.stride + 1

    @property
    def overlap(self) -> int:
        """Largest number of patches that one input position (no padding) belongs to."""
        positions = self.stride * np.arange(self.out)[:, None] + self.dilation * np.arange(
            self.kernel
        )
        counts = np.bincount(positions.ravel(), minlength=self.before + self.size)
        return int(counts[self.before : self.before + self.size].max())

    @property
    def has_inner_patch(self) -> bool:
        """Whether some patch meets no padding."""
        first = -(-self.before // self.stride)
        return first < self.out and first * self.stride + self.extent <= self.before + self.size

    @property
    def reduced_taps(self) -> int:
        """Taps of the stride-1 convolution on the ``stride`` phases of the input."""
        return -(-self.extent // self.stride)

    @property
    def circle(self) -> int:
        """Length of a circle on which the wrapped convolution contains this one as a submatrix.

        On the phases, output i meets m = i + q, 0 <= q < Q = ``reduced_taps``, and the image lies
        in first <= m <= last. Wrapped on n positions, i + q falls onto an image position m that it
        does not meet only if i + q >= first + n or i + q <= last - n, which
        n >= out + Q - 1 - first and n > last exclude. Outputs must be distinct (n >= out), taps too
        (n >= Q).
        """
        first = self.before // self.stride
        last = (self.before + self.size - 1) // self.stride
        taps = self.reduced_taps
        return max(self.out + taps - 1 - first, last + 1, self.out, taps)


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution without its bias; block diagonal over its groups.

    Attributes:
        kernel: (G, O, I, h, w) float64.
        rows: The vertical axis.
        columns: The horizontal axis.
    """

    kernel: torch.Tensor
    rows: Axis
    columns: Axis

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.rows.out, self.columns.out

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Scalars of the output and the input of one group."""
        _, outputs, inputs, _, _ = self.kernel.shape
        return (
            outputs * self.rows.out * self.columns.out,
            inputs * self.rows.size * self.columns.size,
        )

    def product(self, group: int, x: torch.Tensor) -> torch.Tensor:
        """Apply one group to (B, I, H, W) float64 -> (B, O, H_out, W_out)."""
        r, c = self.rows, self.columns
        padded = F.pad(x, (c.before, c.after, r.before, r.after))
        return F.conv2d(
            padded,
            self.kernel[group],
            stride=(r.stride, c.stride),
            dilation=(r.dilation, c.dilation),
        )

    def transposed(self, group: int, y: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of one group to (B, O, H_out, W_out) float64 -> (B, I, H, W)."""
        r, c = self.rows, self.columns
        covered = F.conv_transpose2d(
            y,
            self.kernel[group],
            stride=(r.stride, c.stride),
            dilation=(r.dilation, c.dilation),
        )
        # A stride may leave input positions at the end that no patch covers: zeros.
        missing_rows = max(r.before + r.size - covered.shape[2], 0)
        missing_columns = max(c.before + c.size - covered.shape[3], 0)
        covered = F.pad(covered, (0, missing_columns, 0, missing_rows))
        return covered[:, :, r.before : r.before + r.size, c.before : c.before + c.size]

    def dense(self, group: int) -> torch.Tensor:
        """Matrix of one group, (O H_out W_out, I H W) float64."""
        _, outputs, inputs, _, _ = self.kernel.shape
        basis = torch.eye(min(self.shape), dtype=torch.float64, device=self.kernel.device)
        if self.shape[0] < self.shape[1]:
            images = basis.reshape(-1, outputs, *self.output_size)
            return self.transposed(group, images).flatten(1)
        images = basis.reshape(-1, inputs, self.rows.size, self.columns.size)
        return self.product(group, images).flatten(1).T

    def phase_kernel(self) -> torch.Tensor:
        """Kernel of the equal stride-1 convolution on the phases of the input.

        With u = stride m + b, phase b of the padded image is x_b[m] = x[stride m + b], and
        y[i] = sum_b sum_q K_b[q] x_b[i + q] with K_b[q] = K[stride q + b]: a permutation of the
        input turns the stride into channels. Gaps of the dilation are zero taps.

        Returns:
            (G, O, I stride^2, Q_rows, Q_columns) float64.
        """
        r, c = self.rows, self.columns
        groups, outputs, inputs, _, _ = self.kernel.shape
        rows, columns = r.reduced_taps, c.reduced_taps
        full = self.kernel.new_zeros(groups, outputs, inputs, rows * r.stride, columns * c.stride)
        full[..., : r.extent : r.dilation, : c.extent : c.dilation] = self.kernel
        phases = full.reshape(groups, outputs, inputs, rows, r.stride, columns, c.stride)
        return phases.permute(0, 1, 2, 4, 6, 3, 5).reshape(groups, outputs, -1, rows, columns)


def convolution(
    layer: nn.Conv2d, weight: torch.Tensor, input_size: tuple[int, int], *, name: str
) -> Convolution:
    """Read a layer's geometry for images of one size.

    Args:
        layer: Only its settings are read.
        weight: (C_out, C_in / groups, h, w), the kernel it applies.
        input_size: Height and width of its input.
        name: The layer's name, for errors.

    Returns:
        The operator in float64 on the weight's device.

    Raises:
        MeasurementError: If the padding is not zeros or the input is too small.
    """
    if layer.padding_mode != "zeros":
        raise MeasurementError(
            f"layer {name} (Conv2d): expected zero padding, found padding_mode = "
            f"{layer.padding_mode!r}, whose operator norm is not implemented. Leave out the "
            "bounds for this network."
        )
    axes = []
    for k, size in enumerate(input_size):
        before, after = zero_padding(layer, k, size)
        axis = Axis(
            size=size,
            kernel=layer.kernel_size[k],
            stride=layer.stride[k],
            dilation=layer.dilation[k],
            before=before,
            after=after,
        )
        if size < 1 or axis.out < 1:
            raise MeasurementError(
                f"layer {name} (Conv2d): its kernel spans {axis.extent} positions and does not fit "
                f"an input of {input_size} with padding {layer.padding!r}. Use larger images."
            )
        axes.append(axis)
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    kernel = weight.detach().double().reshape(groups, outputs, *weight.shape[1:])
    return Convolution(kernel, *axes)


def zero_padding(layer: nn.Conv2d, axis: int, size: int) -> tuple[int, int]:
    """Zeros in front of and behind one axis; "same" puts the odd one behind, as torch does.

    Args:
        layer: timm's ``Conv2dSame``, which pads as much as the input needs, or an ordinary one.
        axis: 0 or 1.
        size: Length of the input along it.
    """
    if isinstance(layer, Conv2dSame):
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        total = int(get_same_padding(size, kernel[axis], stride[axis], dilation[axis]))
        return total // 2, total - total // 2
    if isinstance(layer.padding, str):
        total = (
            layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
        )
        return total // 2, total - total // 2
    return layer.padding[axis], layer.padding[axis]
