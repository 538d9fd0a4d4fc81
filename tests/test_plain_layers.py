"""Which layers are taken as what their weight says, and which are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import nn

from tasks.measurement import MeasurementError
from tasks.operator_norm import operator_norm
from tasks.plain_layers import applied_weight, is_plain


class OtherConvForward(nn.Conv2d):
    """A subclass whose forward is inherited and does something else all the same."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.forward = lambda input: nn.functional.linear(input, 2 * layer.weight)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        StdConv2d(4, 4, 3),
        ScaledStdConv2d(4, 4, 3),
        OtherConvForward(4, 4, 3),
        replaced_forward(),
        nn.ConvTranspose2d(4, 4, 3),
        nn.LayerNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_do_not_apply_their_weight_as_it_is_are_refused_by_name(layer: nn.Module):
    assert not is_plain(layer)
    with pytest.raises(MeasurementError, match=rf"layer blocks\.0: .*{type(layer).__name__}"):
        operator_norm(layer, (8, 8), name="blocks.0")


def test_padding_with_anything_but_zeros_is_refused():
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    assert not is_plain(layer)
    with pytest.raises(MeasurementError, match=r"layer stem .*padding_mode = 'reflect'"):
        operator_norm(layer, (8, 8), name="stem")


def test_a_weight_with_nan_is_refused():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = np.nan
    with pytest.raises(MeasurementError, match=r"layer head .*NaN"):
        operator_norm(layer, None, name="head")


def test_an_input_smaller_than_the_kernel_is_refused():
    with pytest.raises(MeasurementError, match="spans 5 positions and does not fit"):
        operator_norm(nn.Conv2d(1, 1, 3, dilation=2), (9, 4), name="deep")


def test_a_convolution_without_an_image_size_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="input_size"):
        operator_norm(nn.Conv2d(1, 1, 3), None, name="conv")


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(2, 4, 3, padding=1)])
def test_a_parametrized_weight_is_followed_and_not_plain(layer: nn.Module):
    assert is_plain(layer)
    layer = nn.utils.parametrizations.weight_norm(layer)
    before = applied_weight(layer, name="g")
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3.0)  # type: ignore[union-attr]
    assert not is_plain(layer)
    torch.testing.assert_close(applied_weight(layer, name="g"), 3 * before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_a_hook_recomputes_is_refused():
    layer = nn.utils.weight_norm(nn.Linear(3, 2))
    assert not is_plain(layer)
    with pytest.raises(MeasurementError, match=r"layer fc: .*Linear"):
        applied_weight(layer, name="fc")


def test_timms_linear_layer_is_plain():
    assert is_plain(TimmLinear(3, 2))
