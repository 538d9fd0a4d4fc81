"""What a checkpoint's architecture tells before its weights are there: sizes, classes, work.

Networks are built on the meta device, so nothing is downloaded and no memory is used. Outlines of
timm's architectures are kept on disk (``tasks.outline_cache``), as 272 of them take a minute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from tasks import outline_cache
from tasks.checkpoint_folder import read_config
from tasks.checkpoints import CheckpointError, CheckpointRef
from tasks.counting import Counts, LayerOutline, count
from tasks.networks import NETWORKS, build_network

# Fields of a pretrained configuration that say where weights are, what they were made for or how
# images are prepared. Checkpoints of one architecture that differ in these alone are one network.
_NO_SHAPE = frozenset((
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag",
    "custom_load", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std",
    "test_input_size", "min_input_size", "test_pool_size", "label_offset", "label_names",
    "label_descriptions", "first_conv", "classifier", "license", "description", "origin_url",
    "paper_name", "paper_ids", "notes",
))  # fmt: skip


@dataclass(frozen=True)
class Outline:
    """A network's sizes, and what the forward of one float32 image does (``tasks.counting``).

    Attributes:
        data_config: The fields that ``tasks.datasets.preprocessing`` takes.
        num_outputs: Number of logits.
        num_parameters: Scalars in all parameters.
        forward_flops: Floating-point operations of one image's forward (a product and a sum are 2).
        layers: Linear and convolutional layers in the order of their calls.
        num_operators: Operators of a forward that write something.
        operator_bytes: What they write for one image.
        backward_flops, backward_operators, backward_bytes: The same of a product with the
            transposed Jacobian.
        tangent_flops, tangent_operators, tangent_bytes: The same of one with the Jacobian.
        largest_bytes: The most that one operator of the forward writes.
        graph_bytes: Activations that the graph of one image's Jacobian keeps.
        double_graph_bytes: The same with the graph of its backward.
        weight_bytes: Parameters and buffers as a weights file holds them.
    """

    data_config: dict[str, Any]
    num_outputs: int
    num_parameters: int
    forward_flops: int
    layers: tuple[LayerOutline, ...] = ()
    # Zero where an older flatcensus wrote them down.
    num_operators: int = 0
    operator_bytes: int = 0
    backward_flops: int = 0
    backward_operators: int = 0
    backward_bytes: int = 0
    tangent_flops: int = 0
    tangent_operators: int = 0
    tangent_bytes: int = 0
    largest_bytes: int = 0
    graph_bytes: int = 0
    double_graph_bytes: int = 0
    weight_bytes: int = 0

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
    """Outline one of ``tasks.networks.NETWORKS`` or a timm architecture; equal ones only once.

    Args:
        architecture: Its name; timm's may carry a tag, which stands for its configuration.
        model_args: Keyword arguments of its constructor.
        pretrained_cfg: As ``config.json`` has it; empty for that of the name.
    """
    config = _configuration(architecture, pretrained_cfg)
    shape = {name: value for name, value in config.items() if name not in _NO_SHAPE}
    named = json.dumps(
        (architecture.partition(".")[0], dict(model_args), shape), sort_keys=True, default=list
    )
    # An argument without effect, because an empty configuration alone is refused.
    data_config = resolve_data_config({"mean": None}, pretrained_cfg=config)
    counts, alike = _counted(named), (named, repr(data_config))
    if alike not in _OUTLINES:  # ten thousand checkpoints of one architecture are one object
        sizes = {name: value for name, value in vars(counts).items() if name != "layers"}
        _OUTLINES[alike] = Outline(data_config=data_config, layers=counts.layers, **sizes)
    return _OUTLINES[alike]


_OUTLINES: dict[tuple[str, str], Outline] = {}


def _configuration(architecture: str, pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The pretrained configuration in full, as timm leaves it on a network."""
    if architecture in NETWORKS:
        return dict(pretrained_cfg)
    if pretrained_cfg:
        fields = {k: v for k, v in pretrained_cfg.items() if k not in ("file", "url", "source")}
        return PretrainedCfg(**fields).to_dict()
    return (timm.get_pretrained_cfg(architecture) or PretrainedCfg()).to_dict()


@cache
def _counted(named: str) -> Counts:
    architecture, model_args, shape = json.loads(named)
    if architecture in NETWORKS:  # in milliseconds
        return _count(architecture, model_args, shape)
    stored = json.dumps([named, [field.name for field in fields(Counts)]])
    if (known := outline_cache.read(stored)) is not None:
        layers = tuple(LayerOutline(*layer) for layer in known.pop("layers"))
        return Counts(**known, layers=layers)
    counts = _count(architecture, model_args, shape)
    layers = [list(vars(layer).values()) for layer in counts.layers]
    outline_cache.write(stored, {**asdict(counts), "layers": layers})
    return counts


def _count(architecture: str, model_args: Mapping[str, Any], shape: Mapping[str, Any]) -> Counts:
    with torch.device("meta"):
        model = _build(architecture, model_args, shape)
    input_size = resolve_data_config({"mean": None}, pretrained_cfg=shape)["input_size"]
    return count(model, tuple(input_size))


def _build(architecture: str, model_args: Mapping[str, Any], shape: Mapping[str, Any]) -> nn.Module:
    if architecture in NETWORKS:
        return build_network(architecture, model_args)
    arguments = {"num_classes": shape.get("num_classes"), **model_args}
    return timm.create_model(
        architecture, pretrained=False, pretrained_cfg=dict(shape), **arguments
    )
