"""Checkpoints: naming them, loading them without running foreign code, saving them.

A checkpoint that does not fit its architecture exactly is an error, never a partial load. Which
files are read, and how, is the subject of ``tasks.weights``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from tasks.checkpoint_folder import read_config, save_checkpoint
from tasks.measurement import Settings
from tasks.networks import NETWORKS, build_network
from tasks.preparation import prepare
from tasks.weights import (
    FETCH_HINT,
    SAFE_SUFFIX,
    WEIGHTS_ONLY_SUFFIXES,
    CheckpointError,
    check_finite,
    foreign_weights,
    load_strictly,
    read_weights,
    safetensors_shapes,
    sha256,
    weights_file,
)

__all__ = [
    "CheckpointError",
    "CheckpointRef",
    "LoadedCheckpoint",
    "architecture_family",
    "describe_local",
    "describe_timm",
    "load_checkpoint",
    "save_checkpoint",
]


class CheckpointRef(Settings):
    """Which checkpoint: everything needed to load it again, and to know that it is the same.

    Attributes:
        source: ``"timm"`` for a name in timm's list of pretrained models, ``"local"`` for a folder.
        name: timm's full name with its tag, or the folder's name.
        identity: ``sha256:<config and weights>`` for a folder; for timm
            ``hub:<repo>@<commit>/<file>``, with ``#<sha256 of the file>`` where the hub states it,
            or ``url:<address>`` of a file whose name ends in digits of its SHA-256.
        family: timm module that defines the architecture, or ``family`` in the folder's config.
        tag: timm's pretrained tag, "" where there is none.
        architecture: timm architecture, or a key of ``tasks.networks.NETWORKS``.
        model_args: Keyword arguments of the architecture.
        path: The folder, or the weights file for timm. Where, not what: no part of the identity.
    """

    source: Literal["timm", "local"]
    name: str
    identity: str
    family: str
    tag: str
    architecture: str
    model_args: dict[str, Any]
    path: str | None = None


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A network ready to be measured.

    Attributes:
        model: In eval mode, parameters frozen, fused attention off, on its device.
        data_config: The fields that ``tasks.datasets.preprocessing`` takes.
        num_outputs: Number of logits, found by a forward of a blank image.
        num_parameters: Trainable scalars.
    """

    model: nn.Module
    data_config: dict[str, Any]
    num_outputs: int
    num_parameters: int


def describe_local(path: Path) -> CheckpointRef:
    """Describe a checkpoint folder: ``config.json`` and ``model.safetensors``, as timm writes them.

    Args:
        path: The folder. ``architecture`` in its config is a timm architecture or one of
            ``tasks.networks.NETWORKS``; ``family`` is optional.

    Raises:
        CheckpointError: If a file is missing or unreadable, or the architecture is unknown.
    """
    path = Path(path)
    config = read_config(path)
    family = architecture_family(config["architecture"])
    weights = weights_file(path)
    config_digest = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    return CheckpointRef(
        source="local",
        name=path.resolve().name,
        identity=local_identity(config_digest, sha256(weights)),
        family=config.get("family") or family,
        tag=config["pretrained_cfg"].get("tag") or "",
        architecture=config["architecture"],
        model_args=config["model_args"],
        path=str(path),
    )


def local_identity(config_digest: str, weights_digest: str) -> str:
    """Identity of a checkpoint folder whose two files have these SHA-256."""
    content = config_digest + weights_digest
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def describe_timm(name: str, *, identity: str, path: Path | None = None) -> CheckpointRef:
    """Describe a pretrained model of timm.

    Args:
        name: Architecture and pretrained tag, e.g. ``vit_base_patch16_224.augreg_in21k_ft_in1k``.
            Without a tag, timm's default tag is filled in.
        identity: ``hub:<repo>@<commit>/<file>``, with ``#<sha256>`` where the hub states it.
        path: The downloaded weights file.

    Raises:
        CheckpointError: If timm does not know the name or has no weights under it.
    """
    architecture, _, tag = name.partition(".")
    family = architecture_family(architecture)
    known = timm.list_models(f"{architecture}*", pretrained=True)
    known = [full for full in known if full.partition(".")[0] == architecture]
    config = timm.get_pretrained_cfg(name) if not tag or name in known else None
    if config is None or not config.has_weights:
        raise CheckpointError(
            f"timm {timm.__version__} has no weights for {name!r}. "
            f"Known: {', '.join(known) or 'none for this architecture'}"
        )
    tag = tag or config.tag or ""
    return CheckpointRef(
        source="timm",
        name=f"{architecture}.{tag}" if tag else architecture,
        identity=identity,
        family=family,
        tag=tag,
        architecture=architecture,
        model_args={},
        path=None if path is None else str(path),
    )


def architecture_family(architecture: str) -> str:
    """Family of an architecture: its timm module, or its own name for our networks.

    Raises:
        CheckpointError: If nobody knows the architecture; names the nearest that exist.
    """
    if architecture in NETWORKS:
        return architecture
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, [*NETWORKS, *timm.list_models()], n=3)
        raise CheckpointError(
            f"unknown architecture {architecture!r} (timm {timm.__version__}). "
            + (f"Did you mean {', '.join(near)}?" if near else "See: timm.list_models()")
        )
    return timm.model_entrypoint(architecture).__module__.rpartition(".")[2]


def load_checkpoint(
    ref: CheckpointRef,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedCheckpoint:
    """Build the network, load its weights strictly and prepare it for measuring.

    Nothing is downloaded: a timm reference must carry the path of its weights file.

    Raises:
        CheckpointError: If the weights are missing, damaged, changed, of another architecture or
            not finite, or the network does not turn one image into one row of logits.
    """
    if ref.path is None:
        raise CheckpointError(f"{ref.name}: expected the path of a weights file, found none.")
    model = _load_timm(ref, Path(ref.path)) if ref.source == "timm" else _load_local(ref)
    check_finite(model, ref.path)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    prepare(model)
    model.to(device=torch.device(device), dtype=dtype)
    data_config = resolve_model_data_config(model)
    num_outputs = _num_outputs(model, data_config, ref, dtype=dtype, device=device)
    return LoadedCheckpoint(model, data_config, num_outputs, num_parameters)


def _load_timm(ref: CheckpointRef, path: Path) -> nn.Module:
    suffixes = WEIGHTS_ONLY_SUFFIXES if ref.identity.startswith("url:") else (SAFE_SUFFIX,)
    if path.suffix not in suffixes:
        expected = " or ".join(suffixes)
        raise CheckpointError(f"{path}: expected a {expected} file for timm's {ref.name}")
    match = re.fullmatch(r"hub:[^#]+#([0-9a-f]{64})|url:.+-([0-9a-f]{8,64})\.\w+", ref.identity)
    digits, found = (match[1] or match[2]) if match else "", sha256(path)
    if not found.startswith(digits):
        raise CheckpointError(f"{path}: expected sha256 {digits}, found {found}. {FETCH_HINT}")
    return _timm_model(ref, path, {})


def _load_local(ref: CheckpointRef) -> nn.Module:
    path = Path(ref.path or "")
    found = describe_local(path).identity
    if found != ref.identity:
        raise CheckpointError(
            f"{path}: expected {ref.identity}, found {found}. The folder changed after the plan "
            "was made; plan again, or restore the files."
        )
    weights = weights_file(path)
    config = read_config(path)
    if ref.architecture not in NETWORKS:
        return _timm_model(ref, weights, config["pretrained_cfg"])
    try:
        model = build_network(ref.architecture, ref.model_args)
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error
    load_strictly(model, read_weights(weights), weights, ref.architecture)
    model.pretrained_cfg = config["pretrained_cfg"]
    return model


def _timm_model(ref: CheckpointRef, weights: Path, pretrained_cfg: dict[str, Any]) -> nn.Module:
    """Let timm build the model, so that its own conversion of old key names applies."""
    # custom_load announces a foreign format (.npz); hub and local files hold native state dicts.
    overlay: dict[str, Any] = {"custom_load": False}
    if weights.suffix == SAFE_SUFFIX:
        shapes = safetensors_shapes(weights)
        overlay["file"] = str(weights)
    else:
        overlay["state_dict"] = read_weights(weights)
        shapes = {key: tuple(value.shape) for key, value in overlay["state_dict"].items()}
    arguments = dict(ref.model_args)
    if pretrained_cfg:
        fields = {k: v for k, v in pretrained_cfg.items() if k not in ("file", "url", "source")}
        arguments["pretrained_cfg"] = fields
        arguments.setdefault("num_classes", fields.get("num_classes"))
    name = ref.name if ref.source == "timm" else ref.architecture
    try:
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    # What timm's converters and torch raise when they meet keys or shapes of another network.
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise foreign_weights(weights, ref.architecture, str(error)) from error
    model.pretrained_cfg.pop("state_dict", None)  # would keep a second copy of the weights
    if ref.source == "local":
        # The conversion also resamples position embeddings to the configured image size. Right
        # for adapting a model, but a folder describes its own weights: they must fit as they are.
        for key, value in model.state_dict().items():
            if shapes.get(key, value.shape) != value.shape:
                raise CheckpointError(
                    f"{weights}: {key} has shape {shapes[key]}, but model_args in config.json give "
                    f"{tuple(value.shape)}. Correct model_args (img_size or patch_size)."
                )
    return model


def _num_outputs(
    model: nn.Module,
    data_config: dict[str, Any],
    ref: CheckpointRef,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> int:
    size = tuple(data_config["input_size"])
    try:
        with torch.no_grad():
            outputs = model(torch.zeros(1, *size, dtype=dtype, device=device))
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{ref.name}: the network does not take images of its own input_size {size} "
            f"({str(error).splitlines()[0]}). Correct pretrained_cfg in its config.json."
        ) from error
    if not torch.is_tensor(outputs) or outputs.ndim != 2:
        found = tuple(outputs.shape) if torch.is_tensor(outputs) else type(outputs).__name__
        raise CheckpointError(f"{ref.name}: expected logits of shape (1, classes), found {found}.")
    if not getattr(model, "num_classes", 0):
        raise CheckpointError(
            f"{ref.name}: the checkpoint has no classifier (num_classes = 0), so there are no "
            "logits to measure. Choose a fine-tuned checkpoint."
        )
    return outputs.shape[1]
