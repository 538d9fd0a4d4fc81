"""A checkpoint folder: ``config.json`` as timm's ``local-dir:`` reads it, and the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from tasks.weights import SAFE_SUFFIX, CheckpointError


def save_checkpoint(
    model: nn.Module,
    directory: Path,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    data_config: Mapping[str, Any],
    family: str,
    label_names: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder that ``describe_local`` reads, and timm's ``local-dir:`` too.

    Equal weights and arguments give equal bytes. The config is written last and both files appear
    under their names only when complete, so a folder with a config is a finished checkpoint.

    Args:
        model: The network.
        directory: The folder; created, an earlier checkpoint in it is replaced.
        architecture: timm architecture, or a key of ``tasks.networks.NETWORKS``.
        model_args: Keyword arguments of the architecture, with ``num_classes``.
        data_config: See ``tasks.datasets.preprocessing``.
        family: What figures colour by.
        label_names: What the outputs are, in order; empty if nobody knows.
        extra: JSON values to keep with the checkpoint, such as how it was trained.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    config = {
        "architecture": architecture,
        "family": family,
        "num_classes": model_args["num_classes"],
        "model_args": dict(model_args),
        "pretrained_cfg": {
            **data_config,
            "num_classes": model_args["num_classes"],
            "fixed_input_size": True,
        },
        **({"label_names": list(label_names)} if label_names else {}),
        **({"extra": dict(extra)} if extra else {}),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(directory / f"model{SAFE_SUFFIX}", save(state))
    _replace(directory / "config.json", text.encode())


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of a checkpoint folder, with ``pretrained_cfg`` and ``model_args`` filled in.

    Raises:
        CheckpointError: If it is missing, not JSON, or names no architecture.
    """
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file}: not found. A checkpoint folder holds config.json and model.safetensors, "
            "as timm.models.save_for_hf writes them."
        )
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, but {error}. Correct the file.") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{file}: expected an object with a string 'architecture'.")
    pretrained_cfg = dict(config.get("pretrained_cfg") or {})
    if "num_classes" in config:
        pretrained_cfg["num_classes"] = config["num_classes"]
    model_args = dict(config.get("model_args") or {})
    default = timm.get_pretrained_cfg(config["architecture"], allow_unregistered=True)
    if default is not None and not default.fixed_input_size:
        # timm would hand an img_size to a constructor that may have none.
        pretrained_cfg["fixed_input_size"] = False
    return config | {"pretrained_cfg": pretrained_cfg, "model_args": model_args}


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)
