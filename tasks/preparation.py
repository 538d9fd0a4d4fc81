"""What has to be switched off in a network before it is differentiated and its weights moved."""

from __future__ import annotations

import types
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn


def prepare(model: nn.Module) -> nn.Module:
    """Put a network into the state that measurements expect; it computes the same function.

    * Eval mode, parameters frozen.
    * Plain instead of fused attention: the fused kernels have neither forward-mode derivatives nor
      a double backward.
    * No cached attention biases (LeViT, TinyViT, EfficientViT and others keep the table gathered at
      the first forward in eval mode): with them neither a gradient nor a changed weight would ever
      reach the bias parameters again.
    * Batch norm with running statistics as the affine map that it is: the CPU kernel's backward is
      wrong, without a word, for one image whose gradient comes from a transposed view (LeViT's
      stem: off by 140 % in torch 2.14).

    Returns:
        The same module.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
        if hasattr(module, "attention_bias_cache"):
            vars(module)["attention_bias_cache"] = _ReadOnce()
        if type(module) in _BATCH_NORMS and module.running_mean is not None:
            vars(module)["forward"] = types.MethodType(_affine, module)
    return model


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


def _affine(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward of a batch norm in eval mode; in training mode, its own."""
    if norm.training:
        return type(norm).forward(norm, x)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    shape = (-1, *[1] * (x.ndim - 2))
    x = x * scale.reshape(shape) + shift.reshape(shape)
    return norm.act(norm.drop(x)) if hasattr(norm, "act") else x  # BatchNormAct2d


class _ReadOnce(dict[Any, Any]):
    """A cache that forgets what it is asked for, so that the next forward gathers it anew."""

    def __getitem__(self, key: Any) -> Any:
        return self.pop(key)
