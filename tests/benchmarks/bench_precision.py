"""What float32, bfloat16 and float16 do to the numbers: relative errors against float64.

Every network is measured in float64 and again in fewer digits, on the same images with the same
draws. A forward in 16 bits has its weights (moved in float32) and images rounded, and a sigmoid in
float64; products in 16 bits are whole rows of the Jacobian, with the slope of the sigmoid taken
from the logits in float64, as everywhere here, or left to autograd in the network's own type.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_members
import numpy as np
import oracles
import torch
from rich.table import Table
from torch import nn

from tasks.adaptive_sharpness import AdaptiveSharpness
from tasks.block import Block
from tasks.checkpoints import CheckpointError
from tasks.families import FAMILIES
from tasks.jacobian import dense_jacobian
from tasks.local_dimensionality import LocalDimensionality
from tasks.measurement import Measurement, Subject
from tasks.replaced import replaced
from tasks.sensitivity import NormalizedMls
from tasks.volume import Volume

from . import networks

NUM_IMAGES = 8
DRAWS = 4
MIN_FAMILIES = 6
SHORT = {"bf16": torch.bfloat16, "f16": torch.float16}


def run(runs: Path, *, most: int | None = None) -> list[dict[str, Any]]:
    """Measure one trained checkpoint of every architecture below ``runs``; random ones if few.

    Args:
        runs: Folder of run folders.
        most: Networks at most.

    Returns:
        One dictionary per network. Errors are relative and the largest over images, but for
        ``volume`` (absolute, of the logarithm) and ``sharpness`` (of the mean over images and
        draws, over the root mean square of the single values, because their mean may be near
        zero; ``..._image`` the median over single ones). NaN where the CPU cannot.
    """
    found = _trained(runs)
    for name, members in FAMILIES.items():
        if len({n.name.partition("/")[0] for n in found}) >= MIN_FAMILIES:
            break
        model, images = family_members.build(members[0]), family_members.images(members[0])
        labels = torch.arange(len(images))
        found.append(networks.Network(f"{name}/random", model, images, labels))
    return [_measure(network) for network in found[:most]]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for reading."""
    shown = Table(*_HEADINGS, title=f"Relative errors against float64, {NUM_IMAGES} images")
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_COLUMNS = {
    "network": "network",
    "sigma": "σ₁, float32",
    "width": "its interval",
    "norm": "‖J‖²",
    "volume": "log volume",
    "sharpness": "sharpness, float32",
    "sharpness_bf16": "bf16 forward",
    "sharpness_f16": "f16 forward",
    "sigma_slope": "σ₁, float32, slope by autograd",
    "sigma_bf16": "σ₁, bf16",
    "sigma_slope_bf16": "bf16, slope by autograd",
    "sigma_f16": "σ₁, f16",
}
_HEADINGS = list(_COLUMNS.values())


def _cells(row: dict[str, Any]) -> list[str]:
    return [v if isinstance(v := row[key], str) else f"{v:.1e}" for key in _COLUMNS]


def _trained(runs: Path) -> list[networks.Network]:
    first: dict[str, networks.Network] = {}
    for path in sorted(path.parent for path in runs.glob("*/checkpoints/*/config.json")):
        config = json.loads((path / "config.json").read_bytes())
        architecture = config["architecture"].removeprefix("flatcensus_")
        if architecture not in first:
            try:
                found = networks.load(path, networks.default_dataset(), num_images=NUM_IMAGES)
            except CheckpointError:  # of an earlier version
                continue
            family = config["family"] if config["family"] in FAMILIES else architecture
            name = f"{family}/{architecture}"
            first[architecture] = networks.Network(name, found.model, found.images, found.labels)
    return [first[name] for name in sorted(first)]


def _measure(network: networks.Network) -> dict[str, Any]:
    model, images, labels = network.model, network.images, network.labels
    size = len(images)
    single = oracles.make_subject(model, images, labels, batch_size=size)
    double = oracles.make_subject(copy.deepcopy(model).double(), images, labels, batch_size=size)
    exact = _rows(double, NormalizedMls(method="dense"), "mls")
    found = NormalizedMls().measure(single, Block(range(size)))
    sigmas = [row for row in found if row.quantity == "mls"]
    widths = [(row.upper or np.nan) - (row.lower or np.nan) for row in sigmas]
    norms = [
        _rows(s, LocalDimensionality(method="dense"), "jacobian_norm_squared")
        for s in (single, double)
    ]
    volumes = [_rows(s, Volume(layers=False), "log_volume") for s in (single, double)]
    row: dict[str, Any] = {
        "network": network.name,
        "num_parameters": single.num_parameters,
        "sigma": _error(np.array([r.value for r in sigmas]), exact),
        "width": float(np.max(widths / exact)) / 2,
        "held": bool(
            all((r.lower or 0) <= e <= (r.upper or 0) for r, e in zip(sigmas, exact, strict=True))
        ),
        "norm": _error(*norms),
        "volume": float(np.abs(volumes[0] - volumes[1]).max()),
    }
    true = _rows(double, AdaptiveSharpness(), "adaptive_sharpness")
    scale = float(np.sqrt(np.square(true).mean()))
    subjects = {"": single, **{f"_{n}": _short(single, d) for n, d in SHORT.items()}}
    for name, subject in subjects.items():
        values = _supported(lambda s=subject: _rows(s, AdaptiveSharpness(), "adaptive_sharpness"))
        row[f"sharpness{name}"] = abs(float(values.mean() - true.mean())) / scale
        row[f"sharpness{name}_image"] = float(np.median(np.abs(values - true) / np.abs(true)))
    row["sharpness_relative_stderr"] = float(true.std() / len(true) ** 0.5) / scale
    for name, dtype in {"": torch.float32, **{f"_{n}": d for n, d in SHORT.items()}}.items():
        short = copy.deepcopy(model).to(dtype)
        inputs = images.to(dtype)
        for key, net, output in (
            ("sigma", short, "sigmoid"), ("sigma_slope", _Sigmoid(short), "identity"),
        ):  # fmt: skip
            if key + name not in row:
                values = _supported(lambda n=net, o=output, x=inputs: _sigmas(n, x, o))
                row[key + name] = _error(values, exact)
    return row


class _Sigmoid(nn.Module):
    """The network with its sigmoid, as autograd sees it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).sigmoid()


class _Short(nn.Module):
    """A network that computes in another type than its weights are kept and moved in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = {n: p.to(self.dtype) for n, p in self.model.named_parameters()}
        return replaced(self.model, values)(images.to(self.dtype))


def _short(subject: Subject, dtype: torch.dtype) -> Subject:
    model = copy.deepcopy(subject.model)
    for module in model.modules():  # parameters are cast at every forward
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return replace(subject, model=_Short(model, dtype), cache={})


def _rows(subject: Subject, measurement: Measurement, quantity: str) -> np.ndarray:
    block = Block(range(subject.batch_size), range(DRAWS))
    rows = measurement.measure(subject, block)
    return np.array([r.value for r in rows if r.quantity == quantity and r.layer is None])


def _sigmas(model: nn.Module, images: torch.Tensor, output: Any) -> np.ndarray:
    rows = torch.cat([dense_jacobian(model, image, output) for image in images.split(1)])
    return torch.linalg.matrix_norm(rows.flatten(2), 2).numpy()


def _supported(call: Callable[[], np.ndarray]) -> np.ndarray:
    """What it gives, NaN where torch has no kernel for the type."""
    try:
        return call()
    except (NotImplementedError, RuntimeError) as error:
        if "not implemented" not in str(error) and "dtype" not in str(error):
            raise
        return np.array([np.nan])


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found / expected - 1)))
