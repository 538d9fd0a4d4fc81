"""What a checkpoint's architecture tells before its weights are there: sizes, classes, FLOPs.

Networks are built on the meta device, so nothing is downloaded and no memory is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.checkpoint_folder import read_config
from tasks.checkpoints import CheckpointError, CheckpointRef
from tasks.networks import NETWORKS, build_network


@dataclass(frozen=True)
class LayerOutline:
    """Sizes of one call of a linear or convolutional layer, for one image.

    Attributes:
        name: Module's name in the network.
        input_size: Scalars that it reads.
        output_size: Scalars that it writes.
        positions: Tokens or patches that share its weight, 1 if it is applied once.
    """

    name: str
    input_size: int
    output_size: int
    positions: int


@dataclass(frozen=True)
class Outline:
    """A network's sizes.

    Attributes:
        data_config: The fields that ``tasks.datasets.preprocessing`` takes.
        num_outputs: Number of logits.
        num_parameters: Scalars in all parameters.
        forward_flops: Floating-point operations of one image's forward (a product and a sum are 2).
        layers: Linear and convolutional layers in the order of their calls.
    """

    data_config: dict[str, Any]
    num_outputs: int
    num_parameters: int
    forward_flops: int
    layers: tuple[LayerOutline, ...] = ()

    @property
    def jacobian_rows(self) -> int:
        """Rows that span every Jacobian: outputs, or features of a linear head if fewer.

        A guess from the sizes, for predictions only: measurements look at the network itself.
        """
        if self.layers and self.layers[-1].output_size == self.num_outputs:
            return min(self.num_outputs, self.layers[-1].input_size)
        return self.num_outputs


def outline(ref: CheckpointRef) -> Outline:
    """Outline a checkpoint from its architecture and configuration alone.

    Raises:
        CheckpointError: If the folder's configuration cannot be read or no network can be built
            from it.
    """
    config = {}
    if ref.source == "local" and ref.path:
        config = read_config(Path(ref.path))["pretrained_cfg"]
    name = ref.name if ref.source == "timm" else ref.architecture
    try:
        return outline_architecture(name, ref.model_args, config)
    # What constructors and forwards raise when arguments do not fit them or each other.
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{ref.path or name}: no {ref.architecture} can be built from its configuration "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Correct model_args or pretrained_cfg in its config.json."
        ) from error


def outline_architecture(
    architecture: str, model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]
) -> Outline:
    """Outline one of ``tasks.networks.NETWORKS`` or a timm architecture; equal ones only once."""
    parts = (architecture, dict(model_args), dict(pretrained_cfg))
    return _outlined(json.dumps(parts, sort_keys=True, default=list))


@cache
def _outlined(parts: str) -> Outline:
    architecture, model_args, pretrained_cfg = json.loads(parts)
    with torch.device("meta"):
        model = _build(architecture, model_args, pretrained_cfg).eval()
        data_config = resolve_model_data_config(model)
        layers: list[LayerOutline] = []
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _watched(model, layers):
            logits = model(torch.empty(1, *data_config["input_size"]))
    return Outline(
        data_config=data_config,
        num_outputs=int(logits.shape[1]),
        num_parameters=sum(p.numel() for p in model.parameters()),
        forward_flops=counter.get_total_flops(),
        layers=tuple(layers),
    )


@contextlib.contextmanager
def _watched(model: nn.Module, layers: list[LayerOutline]) -> Iterator[None]:
    """Note every call of a linear or convolutional layer."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            positions = result.numel() // result.shape[channels]
            layers.append(LayerOutline(name, args[0].numel(), result.numel(), positions))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _build(
    architecture: str, model_args: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]
) -> nn.Module:
    if architecture in NETWORKS:
        model = build_network(architecture, model_args)
        model.pretrained_cfg = dict(pretrained_cfg)  # pyright: ignore[reportArgumentType]
        return model
    arguments: dict[str, Any] = dict(model_args)
    if pretrained_cfg:
        fields = {k: v for k, v in pretrained_cfg.items() if k not in ("file", "url", "source")}
        arguments |= {"pretrained_cfg": fields}
        arguments.setdefault("num_classes", fields.get("num_classes"))
    return timm.create_model(architecture, pretrained=False, **arguments)
