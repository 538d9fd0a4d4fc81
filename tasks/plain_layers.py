"""Which modules apply their weight the way torch's linear and convolutional layers do.

Subclasses may standardise the weight or pad the input in a way of their own, and
parametrizations compute the weight from others. Formulas that read ``module.weight`` hold for the
layers named here and must refuse the rest.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from torch import nn
from torch.nn.utils import parametrize

from tasks.measurement import MeasurementError

# Conv2dSame pads with zeros, by the size of its input: see tasks.convolution.
_OWN_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, TimmLinear.forward, Conv2dSame.forward)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether a module applies ``module.weight``, an ordinary parameter, as torch's layers do.

    False for weight-standardised or other subclasses, for forwards replaced on the instance,
    for weights that a parametrization or hook computes and for padding with anything but zeros.
    """
    return (
        _has_own_forward(module)
        and _holds_weight(module)
        and not (isinstance(module, nn.Conv2d) and module.padding_mode != "zeros")
    )


def applied_weight(layer: nn.Module, *, name: str) -> torch.Tensor:
    """The weight a layer applies, detached, in float64, parametrizations evaluated.

    Args:
        layer: nn.Linear or nn.Conv2d.
        name: The layer's name in the network, for errors.

    Returns:
        (C_out, C_in) or (C_out, C_in / groups, h, w) on the layer's device.

    Raises:
        MeasurementError: If the layer does not apply its weight as it is, or the weight holds NaN
            or infinity.
    """
    holds_weight = _holds_weight(layer) or parametrize.is_parametrized(layer, "weight")
    if not (_has_own_forward(layer) and holds_weight):
        raise MeasurementError(
            f"layer {name}: expected nn.Linear or nn.Conv2d that applies its own weight, found "
            f"{type(layer).__module__}.{type(layer).__name__}, which may change the weight or the "
            "padding in its forward. Leave out the bounds for this network."
        )
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    weight = weight.detach().double()
    if not torch.isfinite(weight).all():
        raise MeasurementError(
            f"layer {name} ({type(layer).__name__}): NaN or infinity in its weight. "
            "Check the checkpoint."
        )
    return weight


def _has_own_forward(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d) or "forward" in vars(module):
        return False
    if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    return type(module).forward in _OWN_FORWARDS


def _holds_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None
